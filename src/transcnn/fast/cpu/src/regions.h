// How the output of an inverted residual is divided into work items, and the halo of one whose output replaces its input.

#pragma once

#include <algorithm>

#include "gemm.h"

constexpr long MAX_COLUMNS = 128;  // of a region, about: with wider rows few hidden channels would fit the cache

struct Shape {
    long batch, height, width, channels;
    long depth;         // channels that the expansion's weights have, more than the input where a product wants that
    long hidden, used;  // hidden channels with padding, a multiple of PANEL; how many of them are computed, one of LANES
    long out_height, out_width, outputs;
    long size, stride, above, before;  // of the depthwise convolution; rows and columns of zeros above and before the map
};

// A work item: rows and columns (ends exclusive) of the output of some images. The images share each read of the hidden channels' weights.
struct Region {
    long image, images, top, bottom, left, right;
};

// How the output is divided into regions.
struct Division {
    long images, bands, rows, across, columns;  // images in a region, how many regions are in them, and their size

    Division(const Shape& s, long threads) {
        // The halo of a band is computed twice, so bands are as high as leaves work for every thread.
        const long for_all = std::min((threads + s.batch - 1) / s.batch, std::max<long>(1, s.out_height / s.size));
        const long even = std::min(2 * threads, s.out_height / (4 * s.size)) / threads * threads;
        bands = s.batch % threads == 0 ? 1 : std::max(for_all, even);
        rows = (s.out_height + bands - 1) / bands;
        bands = (s.out_height + rows - 1) / rows;
        const long each = std::max<long>(1, (s.batch + threads - 1) / threads);  // images per thread
        images = bands > 1 ? 1 : std::clamp<long>(512 / (s.out_height * s.out_width), 1, each);
        across = (s.out_width + MAX_COLUMNS - 1) / MAX_COLUMNS, columns = (s.out_width + across - 1) / across;
    }

    long per_image() const { return bands * across; }

    Region part(const Shape& s, long i) const {
        const long image = i / across / bands * images, top = i / across % bands * rows, left = i % across * columns;
        return Region{image, std::min(images, s.batch - image), top, std::min(s.out_height, top + rows),
                      left,  std::min(s.out_width, left + columns)};
    }
};

// A copy of the halo of a region: rows above, rows below, and columns to the left and right of each row.
template <class T>
class Frame {
  public:
    Frame(const Shape& s, const Region& p, T* memory) : s(s), p(p), halo(s.size / 2), memory(memory) {
        left = std::max<long>(p.left - halo, 0), right = std::min(p.right + halo, s.width);
    }

    long size() const { return 2 * halo * (p.right - p.left + 2 * halo + p.bottom - p.top) * s.channels; }

    void copy(const T* x) {
        for (long y = std::max<long>(p.top - halo, 0); y < std::min(p.bottom + halo, s.height); y++) {
            const T* row = x + (p.image * s.height + y) * s.width * s.channels;
            if (outside(y)) {
                put(at(y), row + left * s.channels, right - left);
                continue;
            }
            put(at(y), row + left * s.channels, p.left - left);
            put(at(y) + halo * s.channels, row + p.right * s.channels, right - p.right);
        }
    }

    // Row y with its halo; assembled in ``to`` where it isn't contiguous.
    const T* row(const T* x, long y, T* to) const {
        if (outside(y)) return at(y);
        put(to, at(y), p.left - left);
        put(to + (p.left - left) * s.channels, x + ((p.image * s.height + y) * s.width + p.left) * s.channels,
            p.right - p.left);
        put(to + (p.right - left) * s.channels, at(y) + halo * s.channels, right - p.right);
        return to;
    }

  private:
    bool outside(long y) const { return y < p.top || y >= p.bottom; }
    T* at(long y) const {
        const long rows = y < p.top ? y - p.top + halo : y - p.bottom + halo;  // of the rows outside
        const long wide = p.right - p.left + 2 * halo;
        return memory + (outside(y) ? rows * wide : 2 * halo * (wide + y - p.top)) * s.channels;
    }
    void put(T* to, const T* from, long positions) const { std::memcpy(to, from, positions * s.channels * sizeof(T)); }

    const Shape& s;
    const Region& p;
    long halo, left, right;
    T* memory;
};
