// Where the grids of a map lie, as transcnn.attention.cut_into_grids cuts them; those at a border are smaller.

#pragma once

#include <algorithm>

#include "product.h"

struct Grids {
    long batch, height, width, channels, head_dim, size;

    long down() const { return (height + size - 1) / size; }
    long across() const { return (width + size - 1) / size; }
    long count() const { return batch * down() * across(); }
    long most() const { return whole(std::min(size, height) * std::min(size, width), PANEL); }
};

// One grid: where it begins, how many positions it has, and copies of them.
struct Grid {
    long corner, rows, columns, width;

    Grid(const Grids& s, long i) : width(s.width) {
        const long top = i / s.across() % s.down() * s.size, left = i % s.across() * s.size;
        rows = std::min(s.size, s.height - top), columns = std::min(s.size, s.width - left);
        corner = (i / (s.down() * s.across()) * s.height + top) * s.width + left;
    }
    long positions() const { return rows * columns; }
    long place(long token) const { return corner + token / columns * width + token % columns; }
    template <class T>
    void copy(const T* map, long channels, T* to) const {
        for (long y = 0; y < rows; y++)
            std::memcpy(to + y * columns * channels, map + (corner + y * width) * channels, columns * channels * sizeof(T));
    }
};
