// How the units of work of a product (row_kernels.cu) are given to thread blocks (CTAs). Compiled for the device, and
// by tests for the host.

#pragma once

#include <algorithm>

#ifdef __CUDACC__
#define EVERYWHERE __host__ __device__ __forceinline__
#else
#define EVERYWHERE inline
#endif

// A CTA has units of cut tiles first, then whole tiles. For a sum over ranks all tiles are cut, in two bands, one after
// the other; a CTA has units of both, and parts of two tiles of a band at most.
struct Work {
    int num_blocks, num_ctas;           // blocks of a tile
    int num_first, num_last, num_whole;  // tiles of the first and the last band, and whole tiles of each CTA
    bool is_reduced;

    EVERYWHERE int first_tile(int band) const { return band == 0 ? 0 : num_first; }
    EVERYWHERE int num_units(int band) const { return (band == 0 ? num_first : num_last) * num_blocks; }
    // Units [begin(band, cta), begin(band, cta + 1)) of a band are the CTA's.
    EVERYWHERE int begin(int band, int cta) const {
        return static_cast<unsigned int>(cta) * num_units(band) / num_ctas;
    }
    EVERYWHERE int cta_of(int band, int unit) const {
        return (static_cast<unsigned int>(unit + 1) * num_ctas - 1) / num_units(band);
    }
    // Where a CTA leaves its part of a tile for a sum over ranks.
    EVERYWHERE int part(int band, int cta, int tile) const {
        return 2 * (band * num_ctas + cta) + (tile != first_tile(band) + begin(band, cta) / num_blocks);
    }
    // How many parts of cut tiles CTAs may leave.
    EVERYWHERE int num_parts() const { return is_reduced ? 4 * num_ctas : num_ctas; }
};

// For `most_ctas` at most. `num_last`: tiles of the second band, of which 0 says that nothing is summed over ranks.
// Every CTA has a unit of each band that is not empty: who adds up a tile's parts waits for all CTAs from its first to
// its last.
inline Work divide(int num_tiles, int num_blocks, int most_ctas, int num_last) {
    const bool is_reduced = num_last > 0;
    const int num_first = num_tiles - num_last;
    const int num_ctas = std::min(most_ctas, num_blocks * (is_reduced ? std::min(num_first, num_last) : num_tiles));
    int num_whole = is_reduced ? 0 : num_tiles / num_ctas;
    const int num_cut = num_first - num_whole * num_ctas;
    if (num_whole > 0 && num_cut > 0 && num_cut * num_blocks < num_ctas) num_whole--;
    return {num_blocks, num_ctas, num_first - num_whole * num_ctas, num_last, num_whole, is_reduced};
}

// Walks through a CTA's units.
struct Cursor {
    int cta, tile, block, band, num_of_cut, num_of_whole;  // the last: units left of this band, and of whole tiles

    EVERYWHERE void begin(const Work& work, int of_cta) {
        cta = of_cta, band = -1, num_of_cut = 0, num_of_whole = work.num_whole * work.num_blocks;
        begin_band(work);
    }

    EVERYWHERE bool is_done() const { return num_of_cut == 0 && num_of_whole == 0; }

    // Units of this tile that come one after the other.
    EVERYWHERE int num_of_tile(const Work& work) const {
        const int num_left = work.num_blocks - block;
        return num_of_cut > 0 && num_of_cut < num_left ? num_of_cut : num_left;
    }

    EVERYWHERE void advance(const Work& work, int count) {
        block += count;
        if (num_of_cut > 0) {
            num_of_cut -= count;
            if (num_of_cut == 0) {
                begin_band(work);
            } else if (block == work.num_blocks) {
                tile++, block = 0;
            }
        } else {
            num_of_whole -= count;
            if (block == work.num_blocks) tile += work.num_ctas, block = 0;
        }
    }

private:
    // Go on with the next band, or with whole tiles.
    EVERYWHERE void begin_band(const Work& work) {
        while (++band < 2) {
            const int first = work.begin(band, cta);
            num_of_cut = work.begin(band, cta + 1) - first;
            tile = work.first_tile(band) + first / work.num_blocks, block = first % work.num_blocks;
            if (num_of_cut > 0) return;
        }
        tile = work.num_first + cta, block = 0;
    }
};
