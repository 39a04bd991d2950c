// The gradient of a 1x1 convolution's weights: with x (positions, inputs) and dy (positions, outputs) dyᵀ·x, summed over some
// positions at a time, which lie in a core's cache meanwhile. The one of both with fewer channels is transposed, the other packed.
// Channels are multiples of 16. Work is assigned to threads statically.

#include <omp.h>

#include <algorithm>

#include "attend.h"
#include "sums.h"

namespace {

constexpr long SOME = 256;  // positions at a time

// Transposes n rows of ``channels`` to (channels, padded), zeros from n on.
template <class T>
void transpose_rows(const T* x, long channels, long n, long padded, T* to) {
    constexpr long WORD = 4 / sizeof(T), STEP = 16 * WORD;  // rows in 32 bits, and in a row of a block
    alignas(64) int32_t block[16 * 16];
    for (long i = 0; i < padded; i += STEP)
        for (long c = 0; c < channels; c += 16) {
            for (long k = 0; k < 16; k++) {
                const T* from = x + (i + k * WORD) * channels + c;
                const long left = n - i - k * WORD;
                for (long lane = 0; lane < 16; lane += LANES) {
                    Bits words{};
                    if constexpr (WORD == 1) {
                        if (left > 0) std::memcpy(&words, from + lane, sizeof words);
                    } else {
                        if (left > 0) words = bits(from + lane);
                        if (left > 1) words |= bits(from + channels + lane) << 16;
                    }
                    std::memcpy(block + k * 16 + lane, &words, sizeof words);
                }
            }
            transpose(block, 16, reinterpret_cast<int32_t*>(to + c * padded + i), padded / WORD);
        }
}

// Has memory brought into the cache bit by bit, a part with each call of next(): prefetchers don't follow a few channels of each
// position, and what is needed next can be fetched while there is something to compute.
template <class T>
class Fetch {
  public:
    Fetch(const T* from, long count, long calls) : at(from), end(from + count), part(round_up((count + calls - 1) / calls, LINE)) {}
    void next() {
        const T* stop = std::min(end, at + part);
        for (; at < stop; at += LINE) __builtin_prefetch(at);
    }

  private:
    static constexpr long LINE = 64 / sizeof(T);
    const T *at, *end;
    long part;
};

// found (threads, outputs · inputs), zeros: as (outputs, inputs) where outputs <= inputs, else transposed; sums (threads,
// outputs), zeros, of dy: null where they aren't wanted.
template <class T>
void gradient(const T* x, const T* dy, float* found, float* sums, long positions, long inputs, long outputs, long threads) {
    const bool few = outputs <= inputs;
    const long rows = few ? outputs : inputs, columns = few ? inputs : outputs, wide = round_up(columns, PANEL);
#pragma omp parallel num_threads(threads)
    {
        [[maybe_unused]] typename Tile<T>::Session session;
        float *own = found + omp_get_thread_num() * rows * columns, *total = sums ? sums + omp_get_thread_num() * outputs : nullptr;
#pragma omp for schedule(static)
        for (long first = 0; first < positions; first += SOME) {
            const long n = std::min(SOME, positions - first), padded = round_up(n, PANEL);
            Scratch& memory = scratch();
            if (!memory.begin((rows + wide) * SOME * sizeof(T) + 256)) continue;
            T *transposed = memory.take<T>(rows * padded), *panels = memory.take<T>(wide * padded);
            const T *in = x + first * inputs, *out = dy + first * outputs;
            transpose_rows(few ? out : in, rows, n, padded, transposed);
            pack(few ? in : out, columns, n, padded, columns, panels);
            const long later = std::min(SOME, positions - first - n);
            const long tiles = (rows + Tile<T>::ROWS - 1) / Tile<T>::ROWS * (wide / PANEL);
            Fetch<T> fetch_in(in + n * inputs, later * inputs, tiles), fetch_out(out + n * outputs, later * outputs, tiles);
            multiply(transposed, padded, rows, panels, padded, padded, columns,
                     [&](long row, long count, long column, long some, const float* c) {
                         fetch_in.next(), fetch_out.next();
                         for (long i = row; i < row + count; i++, c += PANEL)
                             for (long j = 0; j < some; j += LANES) {
                                 float* to = own + i * columns + column + j;
                                 store(to, load(to) + load(c + j));
                             }
                     });
            for (long c = 0; total && c < outputs; c += LANES) {
                Vec sum{};
                for (long i = 0; i < n; i++) sum += load(out + i * outputs + c);
                store(total + c, load(total + c) + sum);
            }
        }
    }
}

}  // namespace

#define POINTWISE(SUFFIX, T)                                                                                             \
    extern "C" void pointwise_gradient_##SUFFIX(const T* x, const T* dy, float* found, float* sums, long positions,     \
                                                long inputs, long outputs, long threads) {                              \
        gradient(x, dy, found, sums, positions, inputs, outputs, threads);                                              \
    }

POINTWISE(fp32, float)
#if defined(__AMX_BF16__) || defined(__AVX512BF16__)
POINTWISE(bf16, bf16)
#endif
