// Top: the numbers of the largest scores of each row; the CUDA form of top_ids in kernels/top.py.
//
// One thread block per row. A radix select finds the key of the last score that is chosen: it
// counts digits in shared memory from the highest one down, and once the scores that can still be
// chosen fit in a list in shared memory, it goes on there. Then one pass writes what is above that
// key and the first of those equal to it, in ascending order by prefix sums: nothing is sorted and
// nothing depends on which thread comes first. Rows of up to LIST scores are read once, others
// twice (the second time mostly from the L2 cache), and at worst, with more than LIST scores that
// agree in all digits but the last, 32 / BITS + 2 times.
//
// LIST is a multiple of 4 and below 2^15; BITS is at most 11; threads are a multiple of 32, at
// most 1024.

#ifndef LIST
#define LIST 4096
#endif
#ifndef BITS
#define BITS 11
#endif
#define ALL 0xffffffffu

struct Shared {
    alignas(16) unsigned keys[LIST];
    alignas(16) int numbers[LIST];
    unsigned bins[1 << BITS];
    unsigned sums[32];
    unsigned digit, above, equal;
};

// Where scores are read: the row, or the list in shared memory.
struct Source {
    const unsigned* row;  // bits of fp32; null if it is the list
    int length;
    int skip;  // scores between the last 16-byte boundary and the row's first
};

// The order of fp32 as that of unsigned integers. -0.0 equals 0.0, NaN of either sign is above
// +inf, and -inf becomes 0: never chosen.
__device__ unsigned key_of(unsigned bits) {
    unsigned magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return 0xffffffffu;
    if (bits == 0xff800000u) return 0u;
    if (magnitude == 0u) return 0x80000000u;
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// Four neighbours; key 0 outside. `quad` may lie behind the end.
__device__ void read(const Source& source, const Shared& shared, int quad, unsigned* key,
                     int* number) {
    int first = 4 * quad - source.skip;
    bool whole = first >= 0 && first + 3 < source.length;
    uint4 four = make_uint4(0u, 0u, 0u, 0u);
    if (source.row == nullptr) {
        if (first < source.length) {
            four = *reinterpret_cast<const uint4*>(shared.keys + first);
            int4 numbers = *reinterpret_cast<const int4*>(shared.numbers + first);
            number[0] = numbers.x, number[1] = numbers.y;
            number[2] = numbers.z, number[3] = numbers.w;
        }
    } else if (whole) {
        four = *reinterpret_cast<const uint4*>(source.row + first);
    }
    key[0] = four.x, key[1] = four.y, key[2] = four.z, key[3] = four.w;
    for (int i = 0; i < 4; ++i) {
        int at = first + i;
        bool inside = at >= 0 && at < source.length;
        if (source.row != nullptr) {
            if (!whole && inside) key[i] = source.row[at];
            key[i] = key_of(key[i]);
            number[i] = at;
        }
        if (!inside) key[i] = 0u;
    }
}

__device__ int quads(const Source& source) { return (source.length + source.skip + 3) / 4; }

__device__ unsigned warp_sum_through(unsigned value) {
    for (unsigned step = 1; step < 32; step *= 2) {
        unsigned before = __shfl_up_sync(ALL, value, step);
        if ((threadIdx.x & 31) >= step) value += before;
    }
    return value;
}

// The sum of `value` over the threads before this one, and over all.
__device__ unsigned sum_before(unsigned value, Shared& shared, unsigned& total) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    unsigned through = warp_sum_through(value);
    __syncthreads();  // the sums of the last call have been read
    if (lane == 31) shared.sums[warp] = through;
    __syncthreads();
    unsigned own = lane < warps ? shared.sums[lane] : 0u;
    unsigned sums = warp_sum_through(own);
    total = __shfl_sync(ALL, sums, 31);
    return __shfl_sync(ALL, sums - own, warp) + through - value;
}

// Counts a digit of `width` bits at `shift`, of the keys whose higher digits are `edge`.
__device__ void count(const Source& source, Shared& shared, unsigned edge, int shift, int width) {
    for (int bin = threadIdx.x; bin < 1 << width; bin += blockDim.x) shared.bins[bin] = 0u;
    __syncthreads();
    for (int quad = threadIdx.x; quad < quads(source); quad += blockDim.x) {
        unsigned key[4];
        int number[4];
        read(source, shared, quad, key, number);
        for (int i = 0; i < 4; ++i) {
            unsigned digits = key[i] >> shift;
            if (key[i] != 0u && digits >> width == edge)
                atomicAdd(&shared.bins[digits & ((1u << width) - 1u)], 1u);
        }
    }
    __syncthreads();
}

// Finds the digit of the `want`-th largest key: how many are above it, how many equal it.
// Returns how many there are in all; finds nothing where they are fewer than `want`.
__device__ unsigned pick(Shared& shared, int width, unsigned want) {
    int bins = 1 << width, each = (bins + blockDim.x - 1) / blockDim.x;
    int last = bins - each * static_cast<int>(threadIdx.x);  // behind this thread's bins
    int first = max(last - each, 0);
    unsigned own = 0u, total;
    for (int bin = first; bin < last; ++bin) own += shared.bins[bin];
    unsigned above = sum_before(own, shared, total);
    if (above < want && want <= above + own) {
        int bin = last - 1;
        while (above + shared.bins[bin] < want) above += shared.bins[bin--];
        shared.digit = bin;
        shared.above = above;
        shared.equal = shared.bins[bin];
    }
    __syncthreads();
    return total;
}

// Hands `put` in ascending order the keys whose digits from `shift` on are above `edge`, and the
// first `ties` of those equal to it. Returns how many.
template <class Put>
__device__ int collect(const Source& source, Shared& shared, int shift, unsigned edge,
                       unsigned ties, Put put) {
    unsigned above = 0u, equal = 0u;
    for (int start = 0; start < quads(source); start += blockDim.x) {
        unsigned key[4], both = 0u, total;  // of two counts below 2^16
        int number[4];
        read(source, shared, start + threadIdx.x, key, number);
        for (int i = 0; i < 4; ++i) {
            unsigned digits = key[i] >> shift;
            both += digits > edge ? 1u << 16 : digits == edge && key[i] != 0u ? 1u : 0u;
        }
        unsigned before = sum_before(both, shared, total);
        unsigned higher = above + (before >> 16), level = equal + (before & 0xffffu);
        for (int i = 0; i < 4; ++i) {
            unsigned digits = key[i] >> shift;
            if (digits > edge) {
                put(higher + min(level, ties), key[i], number[i]);
                ++higher;
            } else if (digits == edge && key[i] != 0u) {
                if (level < ties) put(higher + level, key[i], number[i]);
                ++level;
            }
        }
        above += total >> 16;
        equal += total & 0xffffu;
    }
    __syncthreads();
    return above + min(equal, ties);
}

// Args:
//     scores: fp32, row r at scores + r * stride, `length` of each.
//     chosen: int32 [rows, count], ascending, filled up with -1.
extern "C" __global__ void top_ids(const unsigned* __restrict__ scores, long long stride,
                                   long long length, long long count_, int* __restrict__ chosen) {
    __shared__ Shared shared;
    const unsigned* row = scores + blockIdx.x * stride;
    int* out = chosen + blockIdx.x * count_;
    unsigned count_all = static_cast<unsigned>(count_);
    int skip = static_cast<int>((reinterpret_cast<unsigned long long>(row) & 15u) / 4u);
    Source source = {row, static_cast<int>(length), skip};
    auto list = [&](unsigned at, unsigned key, int number) {
        shared.keys[at] = key;
        shared.numbers[at] = number;
    };
    if (length <= LIST) source = {nullptr, collect(source, shared, 0, 0u, 0u, list), 0};

    unsigned edge = 0u, want = count_all;
    int shift = 32;
    while (true) {
        int width = min(BITS, shift);
        bool highest = shift == 32;
        shift -= width;
        count(source, shared, edge, shift, width);
        if (pick(shared, width, want) <= want && highest) {  // all that may be chosen
            shift = 0, edge = 0u, want = 0u;
            break;
        }
        edge = edge << width | shared.digit;
        want -= shared.above;
        if (shift == 0 || shared.equal == want) break;
        if (source.row != nullptr && count_all - want + shared.equal <= LIST)
            source = {nullptr, collect(source, shared, shift, edge, ALL, list), 0};
    }
    auto answer = [&](unsigned at, unsigned, int number) { out[at] = number; };
    int taken = collect(source, shared, shift, edge, want, answer);
    for (long long at = taken + threadIdx.x; at < count_; at += blockDim.x) out[at] = -1;
}
