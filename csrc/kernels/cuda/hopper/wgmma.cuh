// Products of a warpgroup (wgmma): 64 rows times a tile in shared memory, asynchronously, into
// registers that lie as warp_tile.cuh says, 16 rows a warp.
//
// Tiles are panels of 64 columns, 128 bytes a row, whose 16-byte chunks are permuted as
// Swizzle<8> says and TMA writes them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/cuda/primitives/numerics.cuh"

namespace dilated::kernels::cuda::hopper {

inline constexpr int kPanelColumns = 64, kPanelRowBytes = 128;

/// How a product finds a tile: where it begins, and the bytes from one panel to the next where the
/// product runs along the rows (0: within one panel). These are a descriptor's lower half; the
/// other one is the same for all tiles, 128 bytes permuted and eight rows 1024 bytes. All lanes of
/// a warp call it with the same address, which the compiler learns from the shuffle: it keeps
/// descriptors in uniform registers.
__device__ inline uint32_t describe(uint32_t address, int panel_bytes = 0) {
  return static_cast<uint32_t>(panel_bytes / 16) << 16 |
         (__shfl_sync(kAllLanes, address, 0) & 0x3ffff) / 16;
}
#define DILATED_DESCRIPTOR(name, low) \
  ".reg .b64 " name ";\nmov.b64 " name ", {" low ", 0x40000040};\n"

/// Before products whose registers other instructions wrote.
__device__ inline void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
/// Until at most the kUnderWay youngest groups are under way.
template <int kUnderWay>
__device__ inline void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kUnderWay) : "memory");
}

/// sums[64 x kColumns] = (adds ? sums : 0) + a b over 16 columns of a tile of 64 rows and of one of
/// kColumns rows (rows); sums += a b of 64 x 16 numbers in registers and 16 rows of kColumns
/// (weights); the first over 16 rows of 64 columns, transposed, and 16 of kColumns (transposed).
template <typename Element, int kColumns>
struct Product;

// clang-format off
// Registers and operands of 16 columns each.
#define DILATED_R0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define DILATED_R1 "%8, %9, %10, %11, %12, %13, %14, %15"
#define DILATED_R2 "%16, %17, %18, %19, %20, %21, %22, %23"
#define DILATED_R3 "%24, %25, %26, %27, %28, %29, %30, %31"
#define DILATED_R4 "%32, %33, %34, %35, %36, %37, %38, %39"
#define DILATED_R5 "%40, %41, %42, %43, %44, %45, %46, %47"
#define DILATED_R6 "%48, %49, %50, %51, %52, %53, %54, %55"
#define DILATED_R7 "%56, %57, %58, %59, %60, %61, %62, %63"
#define DILATED_R8 "%64, %65, %66, %67, %68, %69, %70, %71"
#define DILATED_R9 "%72, %73, %74, %75, %76, %77, %78, %79"
#define DILATED_R10 "%80, %81, %82, %83, %84, %85, %86, %87"
#define DILATED_R11 "%88, %89, %90, %91, %92, %93, %94, %95"
#define DILATED_D(i) \
  "+f"(d[2 * i][0]), "+f"(d[2 * i][1]), "+f"(d[2 * i][2]), "+f"(d[2 * i][3]), \
  "+f"(d[2 * i + 1][0]), "+f"(d[2 * i + 1][1]), "+f"(d[2 * i + 1][2]), "+f"(d[2 * i + 1][3])
#define DILATED_R_16 DILATED_R0
#define DILATED_D_16 DILATED_D(0)
#define DILATED_R_32 DILATED_R0 ", " DILATED_R1
#define DILATED_D_32 DILATED_D(0), DILATED_D(1)
#define DILATED_R_48 DILATED_R_32 ", " DILATED_R2
#define DILATED_D_48 DILATED_D_32, DILATED_D(2)
#define DILATED_R_64 DILATED_R_48 ", " DILATED_R3
#define DILATED_D_64 DILATED_D_48, DILATED_D(3)
#define DILATED_R_96 DILATED_R_64 ", " DILATED_R4 ", " DILATED_R5
#define DILATED_D_96 DILATED_D_64, DILATED_D(4), DILATED_D(5)
#define DILATED_R_128 DILATED_R_96 ", " DILATED_R6 ", " DILATED_R7
#define DILATED_D_128 DILATED_D_96, DILATED_D(6), DILATED_D(7)
#define DILATED_R_192 DILATED_R_128 ", " DILATED_R8 ", " DILATED_R9 ", " DILATED_R10 ", " DILATED_R11
#define DILATED_D_192 DILATED_D_128, DILATED_D(8), DILATED_D(9), DILATED_D(10), DILATED_D(11)
#define DILATED_SHARED_PRODUCT(name, kType, kColumns, a0, a1, a2, kTransposed) \
    __device__ static void name(float (&d)[kColumns / 8][4], uint32_t left, uint32_t right, int adds) { \
      asm volatile( \
          "{\n.reg .pred p;\nsetp.ne.b32 p, " a2 ", 0;\n" \
          DILATED_DESCRIPTOR("x", a0) DILATED_DESCRIPTOR("y", a1) \
          "wgmma.mma_async.sync.aligned.m64n" #kColumns "k16.f32." kType "." kType " {" DILATED_R_##kColumns "}, " \
          "x, y, p, 1, 1, " kTransposed ", " kTransposed ";\n}" \
          : DILATED_D_##kColumns : "r"(left), "r"(right), "r"(adds)); \
    }
#define DILATED_PRODUCT(Element, kType, kColumns, a0, a1, a2, a3, b) \
  template <> \
  struct Product<Element, kColumns> { \
    DILATED_SHARED_PRODUCT(rows, kType, kColumns, a0, a1, a2, "0") \
    DILATED_SHARED_PRODUCT(transposed, kType, kColumns, a0, a1, a2, "1") \
    __device__ static void weights(float (&d)[kColumns / 8][4], const uint32_t (&left)[4], uint32_t right) { \
      asm volatile( \
          "{\n" DILATED_DESCRIPTOR("y", b) \
          "wgmma.mma_async.sync.aligned.m64n" #kColumns "k16.f32." kType "." kType " {" DILATED_R_##kColumns "}, " \
          "{" a0 ", " a1 ", " a2 ", " a3 "}, y, 1, 1, 1, 1;\n}" \
          : DILATED_D_##kColumns \
          : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right)); \
    } \
  };
#define DILATED_PRODUCTS(kColumns, a0, a1, a2, a3, b) \
  DILATED_PRODUCT(__half, "f16", kColumns, a0, a1, a2, a3, b) \
  DILATED_PRODUCT(__nv_bfloat16, "bf16", kColumns, a0, a1, a2, a3, b)
DILATED_PRODUCTS(16, "%8", "%9", "%10", "%11", "%12")
DILATED_PRODUCTS(32, "%16", "%17", "%18", "%19", "%20")
DILATED_PRODUCTS(48, "%24", "%25", "%26", "%27", "%28")
DILATED_PRODUCTS(64, "%32", "%33", "%34", "%35", "%36")
DILATED_PRODUCTS(96, "%48", "%49", "%50", "%51", "%52")
DILATED_PRODUCTS(128, "%64", "%65", "%66", "%67", "%68")
DILATED_PRODUCTS(192, "%96", "%97", "%98", "%99", "%100")
// clang-format on
#undef DILATED_PRODUCTS
#undef DILATED_PRODUCT
#undef DILATED_SHARED_PRODUCT
#undef DILATED_DESCRIPTOR
#undef DILATED_D
#undef DILATED_R0
#undef DILATED_R1
#undef DILATED_R2
#undef DILATED_R3
#undef DILATED_R4
#undef DILATED_R5
#undef DILATED_R6
#undef DILATED_R7
#undef DILATED_R8
#undef DILATED_R9
#undef DILATED_R10
#undef DILATED_R11
#undef DILATED_R_16
#undef DILATED_D_16
#undef DILATED_R_32
#undef DILATED_D_32
#undef DILATED_R_48
#undef DILATED_D_48
#undef DILATED_R_64
#undef DILATED_D_64
#undef DILATED_R_96
#undef DILATED_D_96
#undef DILATED_R_128
#undef DILATED_D_128
#undef DILATED_R_192
#undef DILATED_D_192

/// Begins scores = rows times columns, transposed: a tile of 64 rows and one of kColumns, both of
/// kWidth numbers in panels.
template <typename Element, int kWidth, int kTiles>
__device__ inline void begin_scores(float (&scores)[kTiles][4], uint32_t rows, uint32_t columns) {
  constexpr int kColumns = kTiles * 8, kPanelSteps = kPanelColumns / 16;
  begin_products();
#pragma unroll
  for (int step = 0; step < kWidth / 16; ++step) {
    const int panel = step / kPanelSteps, bytes = step % kPanelSteps * 32;
    Product<Element, kColumns>::rows(scores, rows + (panel * 64 * kPanelRowBytes + bytes) / 16,
                                     columns + (panel * kColumns * kPanelRowBytes + bytes) / 16,
                                     step > 0);
  }
  commit_products();
}

/// Begins sums += weights times a tile of as many rows, described with the bytes of its panels.
template <typename Element, int kTiles, int kSteps>
__device__ inline void begin_sums(float (&sums)[kTiles][4], const uint32_t (&weights)[kSteps][1][4],
                                  uint32_t rows) {
  begin_products();
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    Product<Element, kTiles * 8>::weights(sums, weights[step][0],
                                          rows + step * 16 * kPanelRowBytes / 16);
  }
  commit_products();
}

}  // namespace dilated::kernels::cuda::hopper
