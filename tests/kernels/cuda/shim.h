// Runs a CUDA source on the CPU: each thread of a thread block is a fiber, thread blocks take
// turns. All lanes of a warp must reach every shuffle, all threads every barrier; shared memory
// starts as garbage. Each warp runs as far as it can before the next one does, in ascending or
// descending order: a missing barrier shows in one of the two.
#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <memory>
#include <utility>
#include <vector>

using std::max, std::min;

#define __global__
#define __device__
#define __shared__ static __attribute__((section("cuda_shared")))

struct uint3 { unsigned x, y, z; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) int4 { int x, y, z, w; };
static uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

static uint3 threadIdx, blockIdx, blockDim;

namespace shim {
constexpr size_t STACK = 64 * 1024;
struct Barrier { unsigned arrived = 0, round = 0; };
struct Warp { Barrier barrier; unsigned long long slots[2][32]; };
struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[STACK]};
    unsigned calls = 0;
    bool done = false;
};

static std::vector<Fiber> fibers;
static std::vector<Warp> warps;
static Barrier everyone;
static ucontext_t scheduler;
static bool moved;  // whether a fiber got past a barrier or ended since this was false
static void (*body)();
static const long long* arguments;

static Fiber& self() { return fibers[threadIdx.x]; }

static void wait(Barrier& barrier, unsigned threads) {
    unsigned round = barrier.round;
    if (++barrier.arrived == threads) {
        barrier.arrived = 0;
        ++barrier.round;
    }
    while (barrier.round == round) swapcontext(&self().context, &scheduler);
    moved = true;
}

// What each lane of the warp has given. Two sets of slots: the set of one call is overwritten by
// the call after next, which no lane reaches before all have left this one.
static const unsigned long long* exchange(unsigned long long mine) {
    Warp& warp = warps[threadIdx.x / 32];
    unsigned long long* slots = warp.slots[self().calls++ % 2];
    slots[threadIdx.x % 32] = mine;
    wait(warp.barrier, 32);
    return slots;
}

template <class Value>
Value from_lane(Value value, int lane) {
    int own = threadIdx.x % 32;
    unsigned bits = exchange(std::bit_cast<unsigned>(value))[lane < 0 || lane > 31 ? own : lane];
    return std::bit_cast<Value>(bits);
}

// All parameters of our kernels are pointers or long long, so one more or less does no harm.
static void enter() {
    using Long = long long;
    using Kernel = void (*)(Long, Long, Long, Long, Long, Long, Long, Long, Long, Long);
    const Long* a = arguments;
    reinterpret_cast<Kernel>(body)(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9]);
    self().done = moved = true;
}

}  // namespace shim

static void __syncthreads() { shim::wait(shim::everyone, blockDim.x); }
static void __syncwarp() { shim::exchange(0); }

static unsigned __shfl_sync(unsigned, unsigned value, int lane) {
    return shim::from_lane(value, lane);
}
static unsigned __shfl_up_sync(unsigned, unsigned value, int step) {
    return shim::from_lane(value, static_cast<int>(threadIdx.x % 32) - step);
}
static float __shfl_xor_sync(unsigned, float value, int mask) {
    return shim::from_lane(value, (threadIdx.x % 32) ^ mask);
}
static unsigned __match_any_sync(unsigned, int value) {
    const unsigned long long* slots = shim::exchange(static_cast<unsigned>(value));
    unsigned same = 0;
    for (int lane = 0; lane < 32; ++lane)
        same |= unsigned(slots[lane] == static_cast<unsigned>(value)) << lane;
    return same;
}
static unsigned __ballot_sync(unsigned mask, bool value) {
    return value ? __match_any_sync(mask, 1) : ~__match_any_sync(mask, 0);
}
template <class Value>
Value atomicAdd(Value* at, Value more) { return std::exchange(*at, *at + more); }
static int __popc(unsigned bits) { return std::popcount(bits); }
static float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
static unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
static float float_of_half(unsigned short bits) { return std::bit_cast<_Float16>(bits); }
static unsigned half_of_float(float value) { return std::bit_cast<unsigned short>(_Float16(value)); }

extern "C" char __start_cuda_shared[] __attribute__((weak, visibility("hidden")));
extern "C" char __stop_cuda_shared[] __attribute__((weak, visibility("hidden")));

// Returns 0, or 1 if some threads wait for others that never come.
extern "C" int shim_run(void (*kernel)(), const unsigned* grid, unsigned threads,
                        const long long* arguments, int backwards) {
    using namespace shim;
    body = kernel, shim::arguments = arguments, blockDim = {threads, 1, 1};
    for (unsigned block = 0; block < grid[0] * grid[1] * grid[2]; ++block) {
        blockIdx = {block % grid[0], block / grid[0] % grid[1], block / grid[0] / grid[1]};
        std::fill(__start_cuda_shared, __stop_cuda_shared, char(0xa5));
        fibers.resize(max<size_t>(fibers.size(), threads));
        warps.assign((threads + 31) / 32, Warp{}), everyone = {};
        for (Fiber& fiber : fibers) {
            fiber.calls = 0, fiber.done = &fiber >= &fibers.front() + threads;
            getcontext(&fiber.context);
            fiber.context.uc_stack.ss_sp = fiber.stack.get();
            fiber.context.uc_stack.ss_size = STACK;
            fiber.context.uc_link = &scheduler;
            makecontext(&fiber.context, enter, 0);
        }
        for (bool any = true; any;) {
            any = false;
            for (unsigned first = 0; first < threads; any |= moved, first += moved ? 0 : 32) {
                moved = false;
                for (unsigned i = first; i < min(first + 32, threads); ++i) {
                    threadIdx = {backwards ? threads - 1 - i : i, 0, 0};
                    if (!self().done) swapcontext(&scheduler, &self().context);
                }
            }
        }
        if (!std::ranges::all_of(fibers, &Fiber::done)) return 1;
    }
    return 0;
}
