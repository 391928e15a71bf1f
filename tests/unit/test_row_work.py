"""How a product's work is divided (row_work.cuh), compiled for the host: every unit once, and who waits for whom."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from seesaw_ds.model.ops.row_kernels import tiles_of_last_band

FOLDER = Path(__file__).parents[2] / "seesaw_ds" / "model" / "ops"
TESTER = r"""
#include <cstdio>
#include <cstdlib>
#include <map>
#include <set>
#include <utility>
#include <vector>

#include "row_work.cuh"

static Work work;

static void require(bool holds, const char* what) {
    if (holds) return;
    std::printf("%s: %d blocks a tile, %d CTAs, cut %d and %d, whole %d\n", what, work.num_blocks, work.num_ctas,
                work.num_first, work.num_last, work.num_whole);
    std::exit(1);
}

static void check(int num_tiles) {
    std::set<std::pair<int, int>> units;
    std::map<int, std::vector<int>> ctas_of_tile;
    std::set<int> parts;
    for (int cta = 0; cta < work.num_ctas; cta++) {
        Cursor fetching, multiplying;
        fetching.begin(work, cta), multiplying.begin(work, cta);
        require(!multiplying.is_done(), "a CTA without work");
        while (!multiplying.is_done()) {
            const Cursor at = multiplying;
            const int count = at.num_of_tile(work);
            require(count > 0 && at.block + count <= work.num_blocks, "beyond a tile");
            multiplying.advance(work, count);
            for (int i = 0; i < count; i++) {
                require(!fetching.is_done() && fetching.tile == at.tile && fetching.block == at.block + i, "order");
                fetching.advance(work, 1);
                require(units.insert({at.tile, at.block + i}).second, "a unit twice");
            }
            if (!work.is_reduced && count == work.num_blocks) continue;
            ctas_of_tile[at.tile].push_back(cta);
            const int part = work.is_reduced ? work.part(at.band, cta, at.tile) : cta;
            require(part < work.num_parts(), "a part without room");
            // Whoever has the first block of a tile adds up, and leaves nothing; not so of a sum over ranks.
            if (work.is_reduced || at.block > 0) require(parts.insert(part).second, "a part's place twice");
        }
        require(fetching.is_done(), "not all fetched");
    }
    require(static_cast<int>(units.size()) == num_tiles * work.num_blocks, "a unit is missing");
    require(!work.is_reduced || static_cast<int>(ctas_of_tile.size()) == num_tiles, "a tile without parts");
    for (const auto& [tile, ctas] : ctas_of_tile) {
        const int band = work.is_reduced && tile >= work.num_first;
        const int first = (tile - work.first_tile(band)) * work.num_blocks;
        int cta = work.cta_of(band, first);
        for (const int present : ctas) require(present == cta++, "a CTA that others wait for");
        require(cta - 1 == work.cta_of(band, first + work.num_blocks - 1), "the last CTA of a tile");
    }
}

int main() {
    int count = 0;
    for (const int most_ctas : {1, 2, 7, 78, 132, 144})
        for (const int num_tiles : {1, 2, 3, 4, 8, 12, 31, 40, 64, 100, 128, 132, 133, 136, 224, 264, 300, 501})
            for (const int num_blocks : {1, 2, 3, 8, 16, 32, 56, 112, 224}) {
                work = divide(num_tiles, num_blocks, most_ctas, 0);
                check(num_tiles), count++;
                for (const int share : {2, 3, 8, 64}) {
                    const int num_last = num_tiles / share;
                    if (num_last == 0) continue;
                    work = divide(num_tiles, num_blocks, most_ctas, num_last);
                    if (work.num_first > work.num_ctas) continue;  // refused
                    check(num_tiles), count++;
                }
            }
    std::printf("%d\n", count);
}
"""


def test_every_unit_is_done_once_and_nobody_waits_for_a_cta_without_a_part(tmp_path: Path) -> None:
    compiler = shutil.which("c++")
    assert compiler is not None, "no c++ on PATH: the tests need a C++ compiler"
    (tmp_path / "check.cpp").write_text(TESTER)
    command = [compiler, "-std=c++17", "-O1", f"-I{FOLDER}", "-o", str(tmp_path / "check"), str(tmp_path / "check.cpp")]
    subprocess.run(command, check=True)
    done = subprocess.run([tmp_path / "check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert int(done.stdout) > 1500


@pytest.mark.parametrize(
    ("num_tiles", "num_rows", "size", "expected"),
    [
        (64, 36, 4096, 32),
        (64, 36, 14336, 16),
        (64, 20, 14336, 10),
        (64, 1, 14336, 2),  # of 112 blocks each
        (64, 1, 1024, 17),
        (2, 8, 128, 1),
        (32, 112, 4096, 16),
        (32, 72, 14336, 13),
    ],
)
def test_the_last_band_takes_as_long_as_the_sum_of_the_first_travels(num_tiles, num_rows, size, expected) -> None:
    assert tiles_of_last_band(num_tiles, num_rows, size, 132) == expected
