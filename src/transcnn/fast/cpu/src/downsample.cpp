// The pooling branch of TransCNN's downsampling for inference: 2x2 max pooling, 1x1 convolution, sum with the other branch, SiLU.

#include <algorithm>

#include "gemm.h"

namespace {

constexpr long AT_ONCE = 64;  // positions of the output per work item

// y = SiLU(y + weight · pool(x) + bias); x is (batch, height, width, channels), y has half of its rows and columns.
template <class T>
void downsample(const T* x, T* y, const T* weight, const float* bias, long batch, long height, long width, long channels,
                long outputs, long threads) {
    const long down = (height + 1) / 2, across = (width + 1) / 2, chunks = (across + AT_ONCE - 1) / AT_ONCE;
#pragma omp parallel num_threads(threads)
    {
        [[maybe_unused]] typename Tile<T>::Session session;
#pragma omp for schedule(dynamic, 8)
        for (long item = 0; item < batch * down * chunks; item++) {
            const long row = item / chunks, start = item % chunks * AT_ONCE, count = std::min(AT_ONCE, across - start);
            Scratch& memory = scratch();
            if (!memory.begin(AT_ONCE * channels * sizeof(T) + 64)) continue;
            T* pooled = memory.take<T>(AT_ONCE * channels);
            const T* upper = x + (row / down * height + row % down * 2) * width * channels;
            const T* lower = row % down * 2 + 1 < height ? upper + width * channels : upper;
            for (long i = 0; i < count; i++) {
                const long left = (start + i) * 2, right = std::min(left + 1, width - 1);
                for (long c = 0; c < channels; c += LANES) {
                    const Vec above = larger(load(upper + left * channels + c), load(upper + right * channels + c));
                    const Vec below = larger(load(lower + left * channels + c), load(lower + right * channels + c));
                    store(pooled + i * channels + c, larger(above, below));
                }
            }
            T* to = y + (row * across + start) * outputs;
            multiply(pooled, channels, count, weight, channels, channels, outputs,
                     [&](long first, long rows, long column, long some, const float* c) {
                         for (long i = first; i < first + rows; i++, c += PANEL)
                             for (long j = column; j < column + some; j += LANES) {
                                 T* p = to + i * outputs + j;
                                 store(p, silu<T>(load(p) + load(c + j - column) + load(bias + j)));
                             }
                     });
        }
    }
}

}  // namespace

#define DOWNSAMPLE(NAME, T)                                                                                                 \
    extern "C" void NAME(const T* x, T* y, const T* weight, const float* bias, long batch, long height, long width,     \
                         long channels, long outputs, long threads) {                                                   \
        downsample(x, y, weight, bias, batch, height, width, channels, outputs, threads);                               \
    }

DOWNSAMPLE(downsample_fp32, float)
#if defined(__AMX_BF16__) || defined(__AVX512BF16__)
DOWNSAMPLE(downsample_bf16, bf16)
#endif
