// Invert: who chose each block; the CUDA form of Inverse.of in kernels/blocks.py.
//
// A stable counting sort in three launches. Chunks of queries count their choices per block
// (count_choices); each chunk learns how many the chunks before it have (sum_chunks); after a
// prefix sum over blocks, which the caller makes, one warp per chunk places its choices in their
// order (place_choices).
//
// Bytes moved per choice, against a stable torch.sort (CUB radix sort, 4 passes of 8 bits over
// int32 keys and int64 values):
//     torch.sort     4 * (12 read + 12 written) + 4 for the histograms = 100, and about 40 more
//                    to make the keys before and the query groups after
//     here           4 read twice, 8 written, and 4 passes over the counts, which are at most one
//                    int32 for 4 choices: 8 + 8 + 4 = 20, and 8 from the L2 cache for each slice
//                    of blocks but the first. With more than 8 slices the caller takes torch.sort
// The writes are scattered; chunks have 4 or more choices per block, so that most 32-byte sectors
// fill up in the L2 cache while their chunk is placed. With no such merging at all they would cost
// 64 bytes in place of 8, which is still less.
//
// Blocks of a head, and one more for choices of nothing, are cut into slices of SLICE, one per
// thread block: so many counters fit in shared memory. Columns of counts: [heads, blocks] and then
// nothing for each head. Every number outside the grid counts as nothing.

#ifndef SLICE
#define SLICE 8200
#endif
#define ALL 0xffffffffu

// The choices of a chunk of queries by one head, one after the other: this thread's next one.
struct Choice {
    int query, slot;              // slot: the place in the query's list
    int last, width;              // behind the chunk's last query; length of a list
    int query_step, slot_step;    // what one step of `stride` choices is
    long long heads, head;

    __device__ Choice(long long chunk, long long queries, long long heads_, long long width_,
                      int stride)
        : width(static_cast<int>(width_)), heads(heads_), head(blockIdx.y) {
        long long first = blockIdx.x * chunk;
        last = static_cast<int>(min(first + chunk, queries));
        query = static_cast<int>(first) + static_cast<int>(threadIdx.x) / width;
        slot = static_cast<int>(threadIdx.x) % width;
        query_step = stride / width;
        slot_step = stride % width;
    }
    __device__ bool inside() const { return query < last; }
    __device__ long long position() const { return (query * heads + head) * width + slot; }
    __device__ void step() {
        query += query_step;
        slot += slot_step;
        if (slot >= width) slot -= width, ++query;
    }
};

__device__ int bin_of(int id, int blocks) {
    return (id < 0 || id >= blocks ? blocks : id) - static_cast<int>(blockIdx.z) * SLICE;
}

__device__ int bins_here(int blocks) {
    return min(SLICE, blocks + 1 - static_cast<int>(blockIdx.z) * SLICE);
}

__device__ long long column_of(int bin, long long blocks, long long heads) {
    long long block = bin + static_cast<long long>(blockIdx.z) * SLICE;
    return block < blocks ? blockIdx.y * blocks + block : heads * blocks + blockIdx.y;
}

// Grid: chunks, heads, slices. Args:
//     ids: int32 [queries, heads, width].
//     counts: int32 [chunks, heads * (blocks + 1)], all written.
extern "C" __global__ void count_choices(const int* __restrict__ ids, long long queries,
                                         long long heads, long long width, long long blocks,
                                         long long chunk, int* __restrict__ counts) {
    __shared__ int bins[SLICE];
    int here = bins_here(static_cast<int>(blocks));
    for (int bin = threadIdx.x; bin < here; bin += blockDim.x) bins[bin] = 0;
    __syncthreads();
    for (Choice next(chunk, queries, heads, width, blockDim.x); next.inside(); next.step()) {
        int bin = bin_of(ids[next.position()], static_cast<int>(blocks));
        if (bin >= 0 && bin < here) atomicAdd(&bins[bin], 1);
    }
    __syncthreads();
    int* out = counts + blockIdx.x * heads * (blocks + 1);
    for (int bin = threadIdx.x; bin < here; bin += blockDim.x)
        out[column_of(bin, blocks, heads)] = bins[bin];
}

// One thread per column. Each count becomes the sum of those of the chunks before; `totals`
// (int64 [columns]) are the sums of all.
extern "C" __global__ void sum_chunks(int* __restrict__ counts, long long chunks,
                                      long long columns, long long* __restrict__ totals) {
    long long column = blockIdx.x * static_cast<long long>(blockDim.x) + threadIdx.x;
    if (column >= columns) return;
    int sum = 0;
    for (long long first = 0; first < chunks; first += 8) {
        int some[8];  // read before any is written, so that the reads overlap
        for (int i = 0; i < 8; ++i)
            some[i] = first + i < chunks ? counts[(first + i) * columns + column] : 0;
        for (int i = 0; i < 8; ++i) {
            if (first + i < chunks) counts[(first + i) * columns + column] = sum;
            sum += some[i];
        }
    }
    totals[column] = sum;
}

// Grid: chunks, heads, slices; 32 threads. Args:
//     starts: int64 [columns], where each column's choices begin.
//     order, groups: int32 [queries * heads * width], each choice's position in `ids` and its
//         query, by column and then by position.
extern "C" __global__ void place_choices(const int* __restrict__ ids, long long queries,
                                         long long heads, long long width, long long blocks,
                                         long long chunk, const int* __restrict__ counts,
                                         const long long* __restrict__ starts,
                                         int* __restrict__ order, int* __restrict__ groups) {
    __shared__ int places[SLICE];
    int here = bins_here(static_cast<int>(blocks));
    const int* before = counts + blockIdx.x * heads * (blocks + 1);
    for (int bin = threadIdx.x; bin < here; bin += 32) {
        long long column = column_of(bin, blocks, heads);
        places[bin] = static_cast<int>(starts[column]) + before[column];
    }
    __syncwarp();
    Choice next(chunk, queries, heads, width, 32);
    int id = next.inside() ? ids[next.position()] : -1;
    while (__ballot_sync(ALL, next.inside())) {
        Choice choice = next;
        int bin = choice.inside() ? bin_of(id, static_cast<int>(blocks)) : -1;
        if (bin >= here) bin = -1;
        next.step();
        if (next.inside()) id = ids[next.position()];  // early: its latency passes below
        unsigned same = __match_any_sync(ALL, bin);
        int rank = __popc(same & ((1u << threadIdx.x) - 1u)), place = 0;
        if (bin >= 0) {
            place = places[bin] + rank;
            order[place] = static_cast<int>(choice.position());
            groups[place] = choice.query;
        }
        __syncwarp();
        if (bin >= 0 && rank == 0) places[bin] = place + __popc(same);
        __syncwarp();
    }
}
