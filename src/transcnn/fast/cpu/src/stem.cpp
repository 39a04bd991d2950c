// The stem of a network for inference: strided 3x3 convolution, activation, strided 3x3 convolution; or the first two alone.
//
// The map between them, the largest of a network, is never stored as a whole: a few rows of it are computed and used while
// they are in a core's L2 cache. Images may have any strides.

#include <algorithm>

#include "activations.h"
#include "gemm.h"

namespace {

constexpr long CACHE = 1 << 19;  // bytes of the map between the convolutions at a time
constexpr long AT_ONCE = 64;     // positions of the output per product

struct Images {
    const void* data;
    long batch, channels, height, width;
    long strides[4];  // of images, channels, rows and columns
};

constexpr long strided(long n, long stride) { return (n + stride - 1) / stride; }

template <class T>
struct Work {
    Images images;
    T* out;
    const float *first, *first_bias;  // (channels * 9, hidden)
    const T* second;                  // packed, ``depth`` weights per output; null where there is none
    const float* second_bias;
    long hidden, outputs, depth, first_stride, second_stride;
    Activation act;
};

// Computes rows top to bottom (exclusive) of one image's output.
template <class T>
class Rows {
  public:
    Rows(const Work<T>& work, long image, long top, long bottom)
        : w(work), image(image), top(top), bottom(bottom), height(strided(w.images.height, w.first_stride)),
          width(strided(w.images.width, w.first_stride)), line((width + 2) * w.hidden),
          plane(w.images.width + 2 + 2 * SOME) {
        const long rows = w.second ? (bottom - top - 1) * w.second_stride + 3 : 0;
        Scratch& memory = scratch();
        if (!memory.begin((rows * line + AT_ONCE * w.depth) * sizeof(T) + 3 * w.images.channels * plane * 4 + 1024)) return;
        map = memory.take<T>(rows * line);
        im2col = memory.take<T>(AT_ONCE * w.depth);
        planes = memory.take<float>(3 * w.images.channels * plane);
        std::memset(im2col, 0, AT_ONCE * w.depth * sizeof(T));
        std::memset(planes, 0, 3 * w.images.channels * plane * sizeof(float));
    }

    void run() {
        if (!map) return;  // there was no memory
        for (long y = top; y < (w.second ? top : bottom); y++) {
            T* to = w.out + (image * height + y) * width * w.hidden;
            copy(y * w.first_stride - 1);
            w.first_stride == 1 ? first<1>(to) : first<2>(to);
        }
        if (!w.second) return;
        const long begin = top * w.second_stride - 1, end = (bottom - 1) * w.second_stride + 2;
        for (long y = begin; y < end; y++) {
            T* to = map + (y - begin) * line;
            if (y < 0 || y >= height) {
                std::memset(to, 0, line * sizeof(T));
                continue;
            }
            std::memset(to, 0, w.hidden * sizeof(T));
            std::memset(to + line - w.hidden, 0, w.hidden * sizeof(T));
            copy(y * w.first_stride - 1);
            w.first_stride == 1 ? first<1>(to + w.hidden) : first<2>(to + w.hidden);
        }
        for (long y = top; y < bottom; y++) second(y);
    }

  private:
    static constexpr long SOME = 12;  // independent sums

    // Copies rows y to y + 2 of the image as planes, one per channel and row, zero-padded.
    void copy(long y) {
        const Images& s = w.images;
        for (long channel = 0; channel < s.channels; channel++)
            for (long i = 0; i < 3; i++) {
                float* to = planes + (channel * 3 + i) * plane + 1;
                if (y + i < 0 || y + i >= s.height) {
                    std::memset(to, 0, s.width * sizeof(float));
                    continue;
                }
                const T* from = static_cast<const T*>(s.data) + image * s.strides[0] + channel * s.strides[1];
                from += (y + i) * s.strides[2];
                for (long x = 0; x < s.width; x++) to[x] = number(from[x * s.strides[3]]);
            }
    }

    // One row of the first convolution, and the activation.
    template <long STRIDE>
    void first(T* to) {
        for (long c = 0; c < w.hidden; c += LANES)
            for (long x = 0; x < width; x += SOME) {
                Vec sums[SOME];
#pragma GCC unroll 12
                for (Vec& sum : sums) sum = load(w.first_bias + c);
                for (long k = 0; k < w.images.channels * 9; k++) {
                    const float* p = planes + k / 3 * plane + k % 3 + x * STRIDE;
                    const Vec weight = load(w.first + k * w.hidden + c);
#pragma GCC unroll 12
                    for (long i = 0; i < SOME; i++) sums[i] += p[i * STRIDE] * weight;
                }
                w.act.template with<T>([&](auto f) {
                    for (long i = 0; i < SOME && x + i < width; i++) store(to + (x + i) * w.hidden + c, f(sums[i]));
                });
            }
    }

    // One row of the output: im2col, and the product with the weights.
    void second(long y) {
        const long columns = strided(width, w.second_stride), height = strided(this->height, w.second_stride);
        for (long start = 0; start < columns; start += AT_ONCE) {
            const long count = std::min(AT_ONCE, columns - start);
            for (long i = 0; i < 3; i++) {
                const T* from = map + ((y - top) * w.second_stride + i) * line + start * w.second_stride * w.hidden;
                for (long x = 0; x < count; x++)
                    std::memcpy(im2col + x * w.depth + i * 3 * w.hidden, from + x * w.second_stride * w.hidden,
                                3 * w.hidden * sizeof(T));
            }
            T* to = w.out + ((image * height + y) * columns + start) * w.outputs;
            multiply(im2col, w.depth, count, w.second, w.depth, w.depth, w.outputs,
                     [&](long row, long rows, long column, long some, const float* c) {
                         for (long i = row; i < row + rows; i++, c += PANEL)
                             for (long j = 0; j < some; j += LANES)
                                 store(to + i * w.outputs + column + j, load(c + j) + load(w.second_bias + column + j));
                     });
        }
    }

    const Work<T>& w;
    const long image, top, bottom;
    const long height, width, line;  // of the map between the convolutions
    const long plane;                // row length of the copied image, with padding
    T *map = nullptr, *im2col;
    float* planes;
};

template <class T>
void stem(const Work<T>& w, long threads) {
    const long height = strided(strided(w.images.height, w.first_stride), w.second_stride);
    const long row = strided(w.images.width, w.first_stride) * w.hidden * sizeof(T) * w.second_stride;
    const long rows = std::clamp<long>(CACHE / row, 1, 8), pieces = strided(height, rows);
#pragma omp parallel num_threads(threads)
    {
        [[maybe_unused]] typename Tile<T>::Session session;
#pragma omp for schedule(dynamic)
        for (long i = 0; i < w.images.batch * pieces; i++) {
            const long top = i % pieces * rows;
            Rows<T>(w, i / pieces, top, std::min(height, top + rows)).run();
        }
    }
}

}  // namespace

#define STEM(NAME, T)                                                                                                   \
    extern "C" void NAME(const Images* images, T* out, const float* first, const float* first_bias, const T* second,    \
                         const float* second_bias, long hidden, long outputs, long depth, long first_stride,            \
                         long second_stride, const Activation* act, long threads) {                                     \
        stem(Work<T>{*images, out, first, first_bias, second, second_bias, hidden, outputs, depth, first_stride,        \
                     second_stride, *act},                                                                              \
             threads);                                                                                                  \
    }

STEM(stem_fp32, float)
#if defined(__AMX_BF16__) || defined(__AVX512BF16__)
STEM(stem_bf16, bf16)
#endif
