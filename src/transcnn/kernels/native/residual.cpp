// An inverted residual: expansion (1x1), depthwise convolution, projection (1x1), with SiLU after the first two.
//
// The hidden map, several times as wide as the input, is never whole in memory: some channels of some rows of it are made,
// convolved and projected while they are in a core's own cache. Within those, sixteen channels lie together.

#include <algorithm>

#include "depthwise.h"
#include "product.h"

namespace {

constexpr long CACHE = 1 << 20;  // bytes of the hidden map, and of the weights that it meets, at a time

struct Shape {
    long batch, height, width, channels, hidden, outputs, size;
};

template <class T>
struct Work {
    const T *x, *residual;
    T* out;
    const T* expand;
    const float *expand_bias, *mix, *mix_bias;
    const T* project;
    const float* project_bias;
    Shape s;

    // Rows top to bottom (exclusive) of one image.
    void run(long image, long top, long bottom) const {
        const long reach = s.size / 2, wide = s.width + 2 * reach, per_image = s.height * s.width;
        const long step = std::min(bottom - top, std::max<long>(1, (128 + s.width - 1) / s.width));  // rows at a time
        const long line = wide * LANES, block = (step + 2 * reach) * line + AT_ONCE * LANES;  // of 16 channels; some over
        const long column = block * 4 + (step * s.width + s.channels + s.outputs) * LANES * sizeof(T);
        const long together = std::min(s.hidden, std::max<long>(PANEL, CACHE / column * LANES / PANEL * PANEL));
        const bool once = together == s.hidden;
        Scratch& memory = scratch();
        const long results = once ? 0 : (bottom - top) * s.width * s.outputs;
        memory.begin((together / LANES * block + results) * 4 + step * s.width * together * sizeof(T) + 1024);
        float* map = memory.take<float>(together / LANES * block);
        T* mixed = memory.take<T>(step * s.width * together);
        float* sums = memory.take<float>(results);
        std::memset(map, 0, together / LANES * block * sizeof(float));

        const T* own = x + image * per_image * s.channels;
        for (long first = 0; first < s.hidden; first += together) {
            const long some = std::min(together, s.hidden - first);
            for (long y = top; y < bottom; y += step) {
                const long rows = std::min(step, bottom - y);
                long made = y - reach;  // hidden rows from y - reach to this one are there
                if (y > top) {
                    made = y + reach;
                    for (long c = 0; c < some / LANES; c++)
                        std::memmove(map + c * block, map + c * block + step * line, 2 * reach * line * sizeof(float));
                }
                const long from = std::max<long>(made, 0), to = std::min(y + rows + reach, s.height);
                for (long row = made; row < y + rows + reach; row++)  // beyond the image there are zeros
                    if (row < 0 || row >= s.height)
                        for (long c = 0; c < some / LANES; c++)
                            std::memset(map + c * block + (row - y + reach) * line, 0, line * sizeof(float));
                multiply(own + from * s.width * s.channels, s.channels, (to - from) * s.width,
                         expand + first * s.channels, s.channels, s.channels, some,
                         [&](long token, long tokens, long channel, long, const float* c) {
                             const Row low = load(expand_bias + first + channel);
                             const Row high = load(expand_bias + first + channel + LANES);
                             float* left = map + channel / LANES * block;
                             long row = from + token / s.width, place = token % s.width;
                             for (long i = 0; i < tokens; i++, c += PANEL) {
                                 float* p = left + (row - y + reach) * line + (place + reach) * LANES;
                                 store(p, silu<T>(load(c) + low));
                                 store(p + block, silu<T>(load(c + LANES) + high));
                                 if (++place == s.width) place = 0, row++;
                             }
                         });
                for (long c = 0; c < some; c += LANES) {
                    const float* from = map + c / LANES * block;
                    const float* w = mix + first + c;
                    const Row bias = load(mix_bias + first + c);
                    const auto keep = [&](long token, Row sum) { store(mixed + token * some + c, silu<T>(sum)); };
                    if (s.size == 3) convolve<3>(from, rows, s.width, w, s.hidden, bias, keep);
                    if (s.size == 5) convolve<5>(from, rows, s.width, w, s.hidden, bias, keep);
                    if (s.size == 7) convolve<7>(from, rows, s.width, w, s.hidden, bias, keep);
                }
                const long place = image * per_image + y * s.width;
                multiply(mixed, some, rows * s.width, project + first * PANEL, s.hidden, some, s.outputs,
                         [&](long token, long tokens, long channel, long columns, const float* c) {
                             for (long i = token; i < token + tokens; i++, c += PANEL)
                                 for (long j = 0; j < columns; j += LANES) {
                                     const long at = (place + i) * s.outputs + channel + j;
                                     float* sum = sums + ((y - top) * s.width + i) * s.outputs + channel + j;
                                     Row value = load(c + j);
                                     if (first) value += load(sum);
                                     if (first + some < s.hidden) {
                                         store(sum, value);
                                         continue;
                                     }
                                     value += load(project_bias + channel + j);
                                     if (residual) value += load(residual + at);
                                     store(out + at, value);
                                 }
                         });
            }
        }
    }
};

template <class T>
void all_of(const Work<T>& work, long threads) {
    const Shape& s = work.s;
    const long least = std::min(s.height, 4 * s.size);  // rows of a band: those around it are made twice
    long bands = s.batch % threads == 0 ? 1 : std::max<long>(1, std::min(2 * threads, s.height / least));
    const long rows = (s.height + bands - 1) / bands;
    bands = (s.height + rows - 1) / rows;
#pragma omp parallel num_threads(threads)
    {
        [[maybe_unused]] typename Tile<T>::Session session;
#pragma omp for schedule(dynamic)
        for (long i = 0; i < s.batch * bands; i++)
            work.run(i / bands, i % bands * rows, std::min(s.height, (i % bands + 1) * rows));
    }
}

}  // namespace

#define RESIDUAL(NAME, T)                                                                                        \
    extern "C" void NAME(const T* x, const T* residual, T* out, const T* expand, const float* expand_bias,      \
                         const float* mix, const float* mix_bias, const T* project, const float* project_bias, \
                         long batch, long height, long width, long channels, long hidden, long outputs, long size, \
                         long threads) {                                                                         \
        Shape shape{batch, height, width, channels, hidden, outputs, size};                                      \
        all_of(Work<T>{x, residual, out, expand, expand_bias, mix, mix_bias, project, project_bias, shape}, threads); \
    }

RESIDUAL(residual_fp32, float)
#if defined(__AMX_BF16__) || defined(__AVX512BF16__)
RESIDUAL(residual_bf16, bf16)
#endif
