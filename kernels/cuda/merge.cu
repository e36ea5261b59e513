// Merge: N partial results of each row as one; the CUDA form of merge_parts in kernels/merge.py.
//
// One warp per row. A lane holds 16 bytes of the row, and where a row has fewer than 32 such
// pieces, groups of lanes take the parts in turn and add up in the end, always in the same order.

#define ALL 0xffffffffu
#define NOTHING __uint_as_float(0xff800000u)  // -inf

#ifdef __CUDACC__
__device__ float float_of_half(unsigned bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(static_cast<unsigned short>(bits)));
    return value;
}

__device__ unsigned half_of_float(float value) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
#endif

struct Fp32 {
    static constexpr int PER_WORD = 1;
    static __device__ float get(unsigned word, int) { return __uint_as_float(word); }
    static __device__ unsigned put(const float* values) { return __float_as_uint(values[0]); }
};

struct Bf16 {
    static constexpr int PER_WORD = 2;
    static __device__ float get(unsigned word, int i) {
        return __uint_as_float(i ? word & 0xffff0000u : word << 16);
    }
    static __device__ unsigned round(float value) {
        unsigned bits = __float_as_uint(value);
        if (value != value) return 0x7fc0u;
        return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;  // to nearest, ties to even
    }
    static __device__ unsigned put(const float* values) {
        return round(values[0]) | round(values[1]) << 16;
    }
};

struct Fp16 {
    static constexpr int PER_WORD = 2;
    static __device__ float get(unsigned word, int i) {
        return float_of_half(i ? word >> 16 : word & 0xffffu);
    }
    static __device__ unsigned put(const float* values) {
        return half_of_float(values[0]) | half_of_float(values[1]) << 16;
    }
};

// Args:
//     parts_out: [rows, parts, 4 * pieces words], 16-byte aligned.
//     parts_lse: fp32 [rows, parts]; a part of lse -inf is not read.
//     out: [rows, 4 * pieces words]; 0 where all parts have lse -inf.
//     lse: fp32 [rows].
template <class Type>
__device__ void merge(const uint4* __restrict__ parts_out, const float* __restrict__ parts_lse,
                      uint4* __restrict__ out, float* __restrict__ lse, long long rows, int parts,
                      int pieces) {
    constexpr int EACH = 4 * Type::PER_WORD;
    long long row = static_cast<long long>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
    if (row >= rows) return;  // the whole warp
    int lane = threadIdx.x & 31;
    const float* part_lse = parts_lse + row * parts;

    float base = NOTHING, sum = 0.0f;
    for (int part = lane; part < parts; part += 32) base = fmaxf(base, part_lse[part]);
    for (int step = 16; step; step /= 2) base = fmaxf(base, __shfl_xor_sync(ALL, base, step));
    if (base == NOTHING) base = 0.0f;  // -inf minus -inf is NaN
    for (int part = lane; part < parts; part += 32) sum += expf(part_lse[part] - base);
    for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(ALL, sum, step);
    float scale = sum == 0.0f ? 0.0f : 1.0f / sum;
    if (lane == 0) lse[row] = base + logf(sum);

    int wide = 1;
    while (wide < pieces && wide < 32) wide *= 2;
    for (int start = 0; start < pieces; start += wide) {
        int piece = start + (lane & (wide - 1));
        float total[EACH] = {};
        for (int part = lane / wide; part < parts && piece < pieces; part += 32 / wide) {
            float weight = expf(part_lse[part] - base) * scale;
            if (weight == 0.0f) continue;
            uint4 four = parts_out[(row * parts + part) * pieces + piece];
            unsigned word[4] = {four.x, four.y, four.z, four.w};
            for (int i = 0; i < EACH; ++i)
                total[i] += weight * Type::get(word[i / Type::PER_WORD], i % Type::PER_WORD);
        }
        for (int step = wide; step < 32; step *= 2)
            for (int i = 0; i < EACH; ++i) total[i] += __shfl_xor_sync(ALL, total[i], step);
        if (lane < wide && piece < pieces) {
            const float* next = total;
            unsigned word[4];
            for (int i = 0; i < 4; ++i, next += Type::PER_WORD) word[i] = Type::put(next);
            out[row * pieces + piece] = make_uint4(word[0], word[1], word[2], word[3]);
        }
    }
}

#define MERGE(NAME, TYPE)                                                                       \
    extern "C" __global__ void NAME(const uint4* parts_out, const float* parts_lse, uint4* out, \
                                    float* lse, long long rows, long long parts,                \
                                    long long pieces) {                                         \
        merge<TYPE>(parts_out, parts_lse, out, lse, rows, static_cast<int>(parts),              \
                    static_cast<int>(pieces));                                                  \
    }

MERGE(merge_fp32, Fp32)
MERGE(merge_bf16, Bf16)
MERGE(merge_fp16, Fp16)
