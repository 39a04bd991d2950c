// The grids of a map, as transcnn.attention.cut_into_grids cuts them; those at a border are smaller.

#pragma once

#include <algorithm>

#include "gemm.h"

struct Grids {
    long batch, height, width, channels, head_dim, size;

    long down() const { return (height + size - 1) / size; }
    long across() const { return (width + size - 1) / size; }
    long count() const { return batch * down() * across(); }
    long max_positions() const { return round_up(std::min(size, height) * std::min(size, width), PANEL); }
};

// One grid: its first position in the map, its size, and copies of its positions.
struct Grid {
    long corner, rows, columns, width;

    Grid(const Grids& s, long i) : width(s.width) {
        const long top = i / s.across() % s.down() * s.size, left = i % s.across() * s.size;
        rows = std::min(s.size, s.height - top), columns = std::min(s.size, s.width - left);
        corner = (i / (s.down() * s.across()) * s.height + top) * s.width + left;
    }
    long positions() const { return rows * columns; }
    long position(long token) const { return corner + token / columns * width + token % columns; }
    template <class T>
    void copy(const T* map, long channels, T* to) const {
        for (long y = 0; y < rows; y++)
            std::memcpy(to + y * columns * channels, map + (corner + y * width) * channels, columns * channels * sizeof(T));
    }
};
