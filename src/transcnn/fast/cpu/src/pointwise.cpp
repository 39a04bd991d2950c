// A 1x1 convolution or linear layer of any map, with a sum: y = x·Wᵀ + b + residual, (rows, inputs) -> (rows, outputs).

#include <algorithm>

#include "gemm.h"

namespace {

constexpr long AT_A_TIME = 192;  // rows of a work item: a multiple of every tile's

template <class T>
void pointwise(const T* x, const T* residual, T* y, const T* weight, const float* bias, long rows, long inputs, long outputs,
               long threads) {
    // Few rows are shared by their columns: each thread then reads its own part of the weights.
    const long down = (rows + AT_A_TIME - 1) / AT_A_TIME, panels = (outputs + PANEL - 1) / PANEL;
    const long across = down >= threads ? 1 : std::min(panels, (threads + down - 1) / down * 2);
    const long each = (panels + across - 1) / across * PANEL;
#pragma omp parallel num_threads(threads)
    {
        [[maybe_unused]] typename Tile<T>::Session session;
#pragma omp for schedule(dynamic)
        for (long i = 0; i < down * across; i++) {
            const long top = i / across * AT_A_TIME, left = i % across * each;
            if (left >= outputs) continue;
            multiply(x + top * inputs, inputs, std::min(AT_A_TIME, rows - top), weight + left * inputs, inputs, inputs,
                     std::min(each, outputs - left), [&](long row, long count, long column, long columns, const float* c) {
                         for (long r = top + row; r < top + row + count; r++, c += PANEL)
                             for (long j = 0; j < columns; j += LANES) {
                                 const long channel = left + column + j, at = r * outputs + channel;
                                 Vec16 value = load(c + j) + load(bias + channel);
                                 if (residual) value += load(residual + at);
                                 store(y + at, value);
                             }
                     });
        }
    }
}

}  // namespace

#define POINTWISE(SUFFIX, T)                                                                                        \
    extern "C" void pointwise_##SUFFIX(const T* x, const T* residual, T* y, const T* weight, const float* bias,     \
                                       long rows, long inputs, long outputs, long threads) {                       \
        pointwise(x, residual, y, weight, bias, rows, inputs, outputs, threads);                                    \
    }

POINTWISE(fp32, float)
#if defined(__AMX_BF16__) || defined(__AVX512BF16__)
POINTWISE(bf16, bf16)
#endif
