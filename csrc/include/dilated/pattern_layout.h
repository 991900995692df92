// The pattern as the kernels read it: one array of 32-bit words, the same on the host and on a
// device.
//
//   words: [ Header | class heads | span tiles | shifts | windows | tiles | groups | runs | (the
//   same again, transposed) ]
//
// A missing table is all zeros in the header; the two tables may also be the same one.
//
// A *run* is an arithmetic progression of sequence positions. A *group* is a set of rows whose
// columns are the same: its rows and its columns are both lists of runs, relative to an origin. A
// *tile* is up to `row_tile` rows of one group, placed at an origin; the kernels loop over tiles,
// and within a tile over the runs of its columns.
//
// Lists hold *positions*, which masks and dropout compare. Where a row lies in its tensor, its
// *place*, is another number: the tensor holds stretches of the sequence one after another, and
// place = position + the stretch's shift. All rows of a tile lie in one stretch; each run of its
// columns says in which of the stretches that the tile meets it lies. Keys may lie in two tensors,
// each stretch in one: places count through the first, Header::near_keys rows, then through the
// second, so that a run names its tensor by its place. Of a batch of sequences, each with positions
// of its own, no stretch has rows of two; rows between them are in no list.
//
// In the forward table rows are queries and columns are keys; in the transposed one (the
// backward's) rows are keys and columns are queries. Lists hold no causal mask: a causal kernel
// drops the columns after the last row of its tile (forward) or before the first (transposed), and
// compares positions where columns straddle the rows. Where a row sees fewer columns of its list
// for another reason, all rows of the tile have *windows*.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#define DILATED_HOST_DEVICE __host__ __device__
#else
#define DILATED_HOST_DEVICE
#endif

namespace dilated {

/// Positions origin + start + stride * j for 0 <= j < count.
struct Run {
  int32_t start;
  int32_t stride;
  int32_t count;
  uint8_t multiplicity;  // branches that hold each (row, column) pair; 1 in row lists
  uint8_t stretch;       // of columns, counted from Tile::first_stretch; 0 in row lists
  uint16_t head;  // which of the column heads that share the row's head; 0 except transposed with
                  // grouped heads
};

/// Rows that have the same columns; shared by all tiles and origins that look alike.
struct Group {
  int32_t head_class;
  int32_t rows;     // sum of the row runs' counts
  int32_t columns;  // sum of the column runs' counts; 0: these rows attend to nothing
  int32_t row_runs, row_run_count;        // index of the first run in Table::runs_at, and how many
  int32_t column_runs, column_run_count;  // likewise; groups of several classes may share them
  int32_t zero_keys;  // keys of score 0 and value 0 that padding="zeros" adds; forward only
};

/// Rows first_row .. first_row + rows - 1 of a group's concatenated row runs, at `origin`.
struct Tile {
  int32_t group;
  int32_t origin;
  int32_t first_row;
  int32_t rows;
  int32_t row_shift;      // place - position of its rows
  int32_t first_stretch;  // index into Table::shifts_at, which Run::stretch counts from
  int32_t first_window;   // index into Table::windows_at: that of first_row; the next rows' follow.
                          // -1: rows see all columns
  int32_t sequence;       // index in the batch's list; 0 where there is none
};

/// The columns that a row sees: those at first <= position <= last.
struct Window {
  int32_t first, last;
};

/// One direction. Offsets count words from the start of the pattern and are multiples of 4 (16
/// bytes).
struct Table {
  int32_t classes;          // sets of heads that share their lists
  int32_t max_class_heads;  // heads in the largest class
  int32_t spans;  // stretches of the sequence that no branch's segment crosses: nothing in one
                  // meets another
  int32_t tiles, groups, runs, stretches, windows;
  int32_t class_heads_at;  // int32[classes + 1] prefix sums, then the heads (KV heads when
                           // transposed), class by class
  int32_t span_tiles_at;   // int32[spans + 1]: tiles of span s begin at [s]
  int32_t tiles_at;        // Tile[tiles], ordered by span, then class (the last classes taken
                           // together), then rank: longer column lists before shorter
  int32_t groups_at;       // Group[groups]
  int32_t runs_at;         // Run[runs]
  int32_t shifts_at;       // int32[stretches]: place - position of the columns in each stretch
  int32_t windows_at;      // Window[windows]
  int32_t row_tile;        // of the tiles
  float computed[2];       // pairs in tiles of either height, the tall ones first (row_tile.h)
  int32_t reserved[2];
};

inline constexpr int32_t kPatternMagic = 0x44494c50;  // "DILP"

struct Header {
  int32_t magic;
  int32_t words;                     // length of the whole array
  uint32_t fingerprint[2];           // hash of the specification
  int32_t seq_len, heads, kv_heads;  // of a batch of sequences, seq_len is its rows
  int32_t is_causal, branches;
  int32_t queries, keys;  // rows of the tensors
  int32_t near_keys;      // those of the first of the keys' tensors, of which places come first
  int32_t reserved[2];
  uint32_t checksum[2];  // of all words, these two as zeros
  Table forward, transposed;
};
static_assert(sizeof(Run) == 16 && sizeof(Group) == 32 && sizeof(Tile) == 32 &&
              sizeof(Header) % 16 == 0);

/// The tables that the pattern has, as the bits of Directions (pattern.h).
DILATED_HOST_DEVICE inline int32_t directions_of(const Header& header) {
  return (header.forward.runs_at > 0 ? 1 : 0) | (header.transposed.runs_at > 0 ? 2 : 0);
}

/// Rows of each table's tiles; 0: the pattern does not have it.
struct RowTiles {
  int32_t forward, transposed;
};

DILATED_HOST_DEVICE inline RowTiles row_tiles_of(const Header& header) {
  return {header.forward.row_tile, header.transposed.row_tile};
}

/// The number whose halves the header holds, the lower one first.
DILATED_HOST_DEVICE inline uint64_t join(const uint32_t (&halves)[2]) {
  return halves[0] | static_cast<uint64_t>(halves[1]) << 32;
}

/// The index of the 16-byte unit whose second half is Header::checksum.
inline constexpr int64_t kChecksumUnit = offsetof(Header, checksum) / 16;
static_assert(offsetof(Header, checksum) % 16 == 8);

/// What a unit of 16 bytes, two little-endian numbers, adds to the checksum: the xor of the halves
/// of a 128-bit product. The checksum is the sum modulo 2^64 over all units, in any order.
DILATED_HOST_DEVICE inline uint64_t checksum_term(uint64_t first, uint64_t second, uint64_t unit) {
  first ^= (unit + 1) * 0x9e3779b97f4a7c15ull;
  second ^= 0xe7037ed1a0b428dbull;
#if defined(__CUDA_ARCH__)
  return (first * second) ^ __umul64hi(first, second);
#else
  __extension__ using Product = unsigned __int128;
  const Product product = static_cast<Product>(first) * second;
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
#endif
}

/// Typed access to the words; owns nothing.
struct TableView {
  const int32_t* words;
  const Table* table;

  DILATED_HOST_DEVICE const int32_t* class_begin() const { return words + table->class_heads_at; }
  DILATED_HOST_DEVICE const int32_t* class_heads() const {
    return class_begin() + table->classes + 1;
  }
  DILATED_HOST_DEVICE const int32_t* span_tiles() const { return words + table->span_tiles_at; }
  DILATED_HOST_DEVICE const Tile* tiles() const {
    return reinterpret_cast<const Tile*>(words + table->tiles_at);
  }
  DILATED_HOST_DEVICE const Group* groups() const {
    return reinterpret_cast<const Group*>(words + table->groups_at);
  }
  DILATED_HOST_DEVICE const Run* runs() const {
    return reinterpret_cast<const Run*>(words + table->runs_at);
  }
  DILATED_HOST_DEVICE const int32_t* shifts() const { return words + table->shifts_at; }
  DILATED_HOST_DEVICE const Window* windows() const {
    return reinterpret_cast<const Window*>(words + table->windows_at);
  }
};

struct PatternView {
  const int32_t* words;

  DILATED_HOST_DEVICE const Header& header() const {
    return *reinterpret_cast<const Header*>(words);
  }
  DILATED_HOST_DEVICE TableView forward() const { return {words, &header().forward}; }
  DILATED_HOST_DEVICE TableView transposed() const { return {words, &header().transposed}; }
};

/// How many of the run's positions are <= last: its first ones, as positions ascend.
DILATED_HOST_DEVICE inline int32_t count_through(const Run& run, int32_t origin, int32_t last) {
  const int32_t first = origin + run.start;
  if (last < first) {
    return 0;
  }
  const int32_t reach = (last - first) / run.stride;
  return reach < run.count ? reach + 1 : run.count;
}

}  // namespace dilated
