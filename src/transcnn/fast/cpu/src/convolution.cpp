// A convolution of any square size and stride, or a linear layer: act(conv(x) + b + residual), (batch, height, width, channels) ->
// (batch, out_height, out_width, outputs). What each of some positions reads is copied together, and one product follows.

#include <algorithm>

#include "activations.h"
#include "gemm.h"

namespace {

constexpr long AT_A_TIME = 192;  // positions of a work item: a multiple of every tile's

struct Conv {
    long batch, height, width, channels, out_height, out_width, outputs;
    long size, stride, above, before;  // rows and columns of zeros above and before the map

    // Copies what the kernel reads at a position of the output; zeros where it is outside the map.
    template <class T>
    void gather(const T* x, long position, T* to) const {
        const long image = position / (out_height * out_width), rest = position % (out_height * out_width);
        const long top = rest / out_width * stride - above, left = rest % out_width * stride - before;
        const long first = std::max<long>(0, -left), end = std::min(size, width - left);
        for (long i = 0; i < size; i++, to += size * channels) {
            const long y = top + i;
            if (y < 0 || y >= height || first >= end) {
                std::memset(to, 0, size * channels * sizeof(T));
                continue;
            }
            const T* row = x + ((image * height + y) * width + left) * channels;
            std::memset(to, 0, first * channels * sizeof(T));
            std::memcpy(to + first * channels, row + first * channels, (end - first) * channels * sizeof(T));
            std::memset(to + end * channels, 0, (size - end) * channels * sizeof(T));
        }
    }
};

template <class T>
void convolution(const T* x, const T* residual, T* y, const T* weight, const float* bias, const Activation& act, const Conv& s,
                 long threads) {
    const bool copied = s.size > 1 || s.stride > 1 || s.above || s.before;
    const long rows = s.batch * s.out_height * s.out_width, inputs = s.size * s.size * s.channels;
    // Few positions are shared by their columns: each thread then reads its own part of the weights.
    const long down = (rows + AT_A_TIME - 1) / AT_A_TIME, panels = (s.outputs + PANEL - 1) / PANEL;
    const long across = down >= threads ? 1 : std::min(panels, threads);
    const long each = (panels + across - 1) / across * PANEL;
#pragma omp parallel num_threads(threads)
    {
        [[maybe_unused]] typename Tile<T>::Session session;
#pragma omp for schedule(dynamic)
        for (long i = 0; i < down * across; i++) {
            const long top = i / across * AT_A_TIME, left = i % across * each, count = std::min(AT_A_TIME, rows - top);
            Scratch& memory = scratch();
            if (left >= s.outputs || !memory.begin(copied * count * inputs * sizeof(T) + 64)) continue;
            T* own = memory.take<T>(copied * count * inputs);
            for (long row = 0; copied && row < count; row++) s.gather(x, top + row, own + row * inputs);
            multiply(copied ? own : x + top * inputs, inputs, count, weight + left * inputs, inputs, inputs, std::min(each, s.outputs - left),
                     [&](long row, long some, long column, long columns, const float* c) {
                         act.with<T>([&](auto f) {
                             for (long r = 0; r < some; r++)
                                 for (long j = 0; j < columns; j += LANES) {
                                     const long channel = left + column + j, at = (top + row + r) * s.outputs + channel;
                                     Vec value = load(c + r * PANEL + j) + load(bias + channel);
                                     if (residual) value += load(residual + at);
                                     store(y + at, f(value));
                                 }
                         });
                     });
        }
    }
}

}  // namespace

#define CONVOLUTION(SUFFIX, T)                                                                                            \
    extern "C" void convolution_##SUFFIX(const T* x, const T* residual, T* y, const T* weight, const float* bias,         \
                                         const Activation* act, const Conv* sizes, long threads) {                       \
        convolution(x, residual, y, weight, bias, *act, *sizes, threads);                                                 \
    }

CONVOLUTION(fp32, float)
#if defined(__AMX_BF16__) || defined(__AVX512BF16__)
CONVOLUTION(bf16, bf16)
#endif
