// 3x3 convolution of stride 1 and padding 1 on packed rows, on tensor cores.
//
// A tile is 64 or 128 consecutive rows: whole patches, or some lines of one. Its pixels and those around them (a halo
// of one pixel about each patch, zeros where nothing is active) are copied to shared memory once per slice of channels
// and serve all nine taps, each a view that is shifted by a constant.
#include <limits>

#include "cuda_launch.h"
#include "cuda_types.h"
#include "mma.h"

namespace spark {
namespace {

constexpr int kTaps = 9;
constexpr int kPiece = 8;  // channels that are copied together: 16 bytes

int64_t device_attribute(cudaDeviceAttr attribute, int device, const char* kernel) {
  int value;
  check(cudaDeviceGetAttribute(&value, attribute, device), kernel);
  return value;
}

// How a tile of `rows` rows lies in its map. A unit is what has a halo of its own: a patch, or some lines of one.
struct Tile {
  int rows, side, log_side, log_area;
  int pitch;  // of a halo: side + 2
  int unit_rows, log_unit_rows, units;
  int unit_halo, halo;    // pixels of a unit with its halo, and of all units
  int by_pitch, by_unit;  // division of a halo's pixel by them: (pixel * by) >> 16

  Tile(int rows, int side) : rows(rows), side(side), log_side(0), pitch(side + 2), log_unit_rows(0) {
    while (1 << log_side < side) ++log_side;
    log_area = 2 * log_side;
    unit_rows = std::min(rows, side * side);
    while (1 << log_unit_rows < unit_rows) ++log_unit_rows;
    units = rows / unit_rows;
    unit_halo = (unit_rows / side + 2) * pitch;
    halo = units * unit_halo;
    by_pitch = 65536 / pitch + 1;
    by_unit = 65536 / unit_halo + 1;
  }

  // The pixel in the halo that row `row` of the tile reads at the first tap; tap (y, x) is y * pitch + x further.
  __device__ int first_pixel(int row) const {
    const int unit = row >> log_unit_rows, inside = row & (unit_rows - 1);
    return unit * unit_halo + (inside >> log_side) * pitch + (inside & (side - 1));
  }
};

struct Patches {
  const int32_t* coords;         // [count, 3] image, grid row, grid column
  const int32_t* grid_to_patch;  // [images, gh, gw]
  int64_t count;
  int gh, gw;
};

// What is known of a tile before its copies begin, in three steps: places of its units, the 3x3 patches around each,
// the rows of its halo. A barrier lies between the steps, and between reading global memory and writing it down here
// some computing, that hides the wait.
struct Surroundings {
  int32_t* places;  // [units, 3] image, grid row, grid column; -1 where there is no patch
  int32_t* around;  // [units, 9] patches, -1 where there is none
  // [halo] row of the map, or -1, times 8, plus what tells a pixel's pieces from its neighbours' (see piece_at)
  int64_t* rows;

  __host__ __device__ static int64_t bytes(const Tile& tile) { return tile.halo * 8 + tile.units * (kTaps + 3) * 4; }

  __device__ static Surroundings at(void* memory, const Tile& tile) {
    int64_t* const rows = static_cast<int64_t*>(memory);
    int32_t* const around = reinterpret_cast<int32_t*>(rows + tile.halo);
    return {around + tile.units * kTaps, around, rows};
  }
};

__device__ int32_t read_place(const Patches& patches, const Tile& tile, int64_t number, int entry) {
  const int unit = entry / 3, which = entry - 3 * unit;
  const int64_t patch = (number * tile.rows + unit * tile.unit_rows) >> tile.log_area;
  return patch < patches.count ? patches.coords[3 * patch + which] : -1;
}

__device__ int32_t read_around(const Patches& patches, const int32_t* places, int entry) {
  const int unit = entry / kTaps, which = entry - unit * kTaps;
  const int32_t* const place = places + 3 * unit;
  const int y = place[1] + which / 3 - 1, x = place[2] + which % 3 - 1;
  if (place[0] < 0 || y < 0 || y >= patches.gh || x < 0 || x >= patches.gw) return -1;
  return patches.grid_to_patch[(static_cast<int64_t>(place[0]) * patches.gh + y) * patches.gw + x];
}

__device__ int64_t row_of_pixel(const Tile& tile, const int32_t* around, int64_t number, int pixel) {
  const int unit = (pixel * tile.by_unit) >> 16, inside = pixel - unit * tile.unit_halo;
  const int halo_y = (inside * tile.by_pitch) >> 16, halo_x = inside - halo_y * tile.pitch;
  const int first = static_cast<int>((number * tile.rows + unit * tile.unit_rows) & ((1 << tile.log_area) - 1));
  const int y = (first >> tile.log_side) + halo_y - 1, x = halo_x - 1;
  const int which = (y < 0 ? 0 : y < tile.side ? 3 : 6) + (x < 0 ? 0 : x < tile.side ? 1 : 2);
  const int64_t patch = around[unit * kTaps + which];
  const int inner = (y & (tile.side - 1)) * tile.side + (x & (tile.side - 1));
  const int64_t row = patch < 0 ? -1 : (patch << tile.log_area) + inner;
  return row * 8 + ((halo_y * tile.side + halo_x + unit * tile.unit_rows) & 7);
}

__device__ void find_rows(const Tile& tile, const Surroundings& to, int64_t number) {
  for (int pixel = threadIdx.x; pixel < tile.halo; pixel += blockDim.x)
    to.rows[pixel] = row_of_pixel(tile, to.around, number, pixel);
}

// All three steps at once, where nothing can be computed meanwhile. All threads call it.
__device__ void find_surroundings(const Patches& patches, const Tile& tile, const Surroundings& to, int64_t number,
                                  int steps) {
  for (int entry = threadIdx.x; entry < tile.units * 3; entry += blockDim.x)
    to.places[entry] = read_place(patches, tile, number, entry);
  __syncthreads();
  if (steps < 2) return;
  for (int entry = threadIdx.x; entry < tile.units * kTaps; entry += blockDim.x)
    to.around[entry] = read_around(patches, to.places, entry);
  __syncthreads();
  if (steps < 3) return;
  find_rows(tile, to, number);
  __syncthreads();
}

// Byte offset of 16-byte piece `piece` of an item of kPieces pieces. `key` counts rows (of pixels: y * side + x, plus
// the rows of the units before): eight that ldmatrix reads together are consecutive, so they lie in different banks.
template <int kPieces>
__device__ __forceinline__ int piece_at(int item, int key, int piece) {
  const int swizzle = kPieces == 4 ? (key >> 1) & 3 : key & 7;
  return (item * kPieces + (piece ^ swizzle)) * 16;
}

// Begins to copy kPieces * 8 channels from `first` on of each pixel of a halo.
template <typename T, int kPieces>
__device__ void copy_halo(SharedAddress to, const T* source, const int64_t* rows, int pixels, int channels, int first) {
  for (int i = threadIdx.x; i < pixels * kPieces; i += blockDim.x) {
    const int pixel = i / kPieces, piece = i % kPieces, channel = first + piece * kPiece;
    const int64_t entry = rows[pixel], row = entry >> 3;
    const bool exists = row >= 0 && channel < channels;
    copy_async(to + piece_at<kPieces>(pixel, static_cast<int>(entry & 7), piece),
               exists ? source + row * channels + channel : source, exists);
  }
}

// Lane t of four that follow one another gives registers 0..3 and gets register t of each of them.
__device__ __forceinline__ void transpose_quad(uint32_t (&values)[4], int lane) {
#pragma unroll
  for (int bit = 1; bit < 4; bit *= 2) {
    const bool high = lane & bit;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & bit) continue;
      const uint32_t got = __shfl_xor_sync(0xFFFFFFFFu, high ? values[i] : values[i | bit], bit);
      values[i] = high ? got : values[i];
      values[i | bit] = high ? values[i | bit] : got;
    }
  }
}

// Forward and gradient of the input. A block computes tiles of 128 rows and kColumns output channels, one after the
// other; the product's depth is gone through in steps of one tap and 32 input channels (a slice).
namespace gather {

constexpr int kThreads = 128, kRows = 128;
constexpr int kPieces = 4, kDepth = kPieces * kPiece;
constexpr int kAhead = 3;  // steps of weights that are under way
constexpr int kLeastStages = kAhead + 1;
// At this tap the next halo's rows are found; at the one after, three steps before they are needed, its copies begin.
constexpr int kFindTap = 4;
static_assert(kRows / 4 * kTaps <= (kFindTap - 1) * kThreads);  // patches of 2x2 have the most neighbours

struct Problem {
  Tile tile;
  Patches patches;
  int channels = 0, columns = 0;  // of the source, of the result
  int slices = 0, panels = 0;     // of 32 channels, of kColumns columns
  int64_t tiles = 0;
  int64_t stride_tiles = 0;  // from an item (a tile and a panel) of a block to its next
  int stride_panels = 0;
  bool turned = false;    // taps in reverse
  int stages = 0;         // steps of weights that shared memory holds
  bool resident = false;  // it holds all, they are copied once
};

// A place in the sequence of steps of a block: for each of its items, for each slice, nine taps.
struct Step {
  int64_t tile;
  int panel, slice, tap, stage;

  __device__ void next_item(const Problem& p) {
    tile += p.stride_tiles;
    panel += p.stride_panels;
    if (panel < p.panels) return;
    panel -= p.panels;
    ++tile;
  }

  __device__ void advance(const Problem& p) {
    stage = stage + 1 == p.stages ? 0 : stage + 1;
    if (++tap < kTaps) return;
    tap = 0;
    if (++slice < p.slices) return;
    slice = 0;
    next_item(p);
  }
};

// Begins to copy a step's weights, [32][kColumns]; zeros beyond the channels and columns that exist.
template <typename T, int kColumns>
__device__ void copy_weight(SharedAddress to, const T* weight, const Problem& p, const Step& step) {
  constexpr int kAcross = kColumns / kPiece;
  const int64_t tap = p.turned ? kTaps - 1 - step.tap : step.tap;
  const int first = step.panel * kColumns;
#pragma unroll
  for (int i = threadIdx.x; i < kDepth * kAcross; i += kThreads) {
    const int deep = i / kAcross, piece = i % kAcross;
    const int channel = step.slice * kDepth + deep, column = first + piece * kPiece;
    const bool exists = channel < p.channels && column < p.columns;
    copy_async(to + piece_at<kAcross>(deep, deep, piece),
               exists ? weight + (tap * p.channels + channel) * p.columns + column : weight, exists);
  }
}

// source [rows, channels], weight [9, channels, columns], bias [columns] or null, out [rows, columns]
template <typename T, int kColumns>
__global__ void __launch_bounds__(kThreads, 2)
    conv_gather_kernel(const T* source, const T* weight, const T* bias, T* out, const Problem p) {
  // Four warps of 64 columns each: two beside two, or one above the other.
  constexpr int kWarpsAcross = kColumns / 64, kWarpRows = kRows * kWarpsAcross / 4;
  constexpr int kHigh = kWarpRows / 16, kWide = 64 / 8;  // products of m16n8k16 of a warp
  constexpr int kStageBytes = kDepth * kColumns * 2;
  SPARK_DYNAMIC_SHARED(unsigned char, shared);
  const SharedAddress weights = shared_address(shared);
  const SharedAddress halos = weights + p.stages * kStageBytes;
  const int halo_bytes = p.tile.halo * kPieces * 16;
  const Surroundings around = Surroundings::at(shared + p.stages * kStageBytes + 2 * halo_bytes, p.tile);

  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int warp_row = warp / kWarpsAcross * kWarpRows, warp_column = warp % kWarpsAcross * 64;
  const int matrix = lane / 8, line = lane % 8;  // of what ldmatrix reads
  int pixels[kHigh];
#pragma unroll
  for (int i = 0; i < kHigh; ++i) pixels[i] = p.tile.first_pixel(warp_row + 16 * i + 8 * (matrix & 1) + line);

  int buffer = 0;  // the halo's
  struct Fragments {
    uint32_t a[kHigh][4], b[kWide / 2][4];
  } fragments[kDepth / 16];
  const auto load = [&](const Step& step, int k) {
    const int tap_y = step.tap / 3, tap_x = step.tap - 3 * tap_y;
    const int shift = tap_y * p.tile.pitch + tap_x, key = line + tap_y * p.tile.side + tap_x;
    const SharedAddress halo = halos + buffer * halo_bytes, panel = weights + step.stage * kStageBytes;
#pragma unroll
    for (int i = 0; i < kHigh; ++i)
      load_matrices(fragments[k].a[i], halo + piece_at<kPieces>(pixels[i] + shift, key, 2 * k + matrix / 2));
#pragma unroll
    for (int j = 0; j < kWide / 2; ++j)
      load_transposed(fragments[k].b[j],
                      panel + piece_at<kColumns / kPiece>(16 * k + 8 * (matrix & 1) + line, line,
                                                          warp_column / kPiece + 2 * j + matrix / 2));
  };
  float sums[kHigh][kWide][4] = {};
  const auto multiply = [&](int k) {
#pragma unroll
    for (int i = 0; i < kHigh; ++i)
#pragma unroll
      for (int j = 0; j < kWide; ++j)
        multiply_add<T>(sums[i][j], fragments[k].a[i], fragments[k].b[j / 2][2 * (j % 2)],
                        fragments[k].b[j / 2][2 * (j % 2) + 1]);
  };

  Step now{blockIdx.x / p.panels, static_cast<int>(blockIdx.x % p.panels), 0, 0, 0}, ahead = now;
  find_surroundings(p.patches, p.tile, around, now.tile, 3);
  copy_halo<T, kPieces>(halos, source, around.rows, p.tile.halo, p.channels, 0);
  for (int i = 0; i < kAhead; ++i) {
    copy_weight<T, kColumns>(weights + ahead.stage * kStageBytes, weight, p, ahead);
    commit_copies();
    ahead.advance(p);
  }
  wait_copies<kAhead - 1>();
  __syncthreads();
  load(now, 0);

  while (now.tile < p.tiles) {
    // Since the last barrier nobody reads any more what the step before read.
    if (ahead.tile < p.tiles && (!p.resident || ahead.tile == blockIdx.x))
      copy_weight<T, kColumns>(weights + ahead.stage * kStageBytes, weight, p, ahead);
    ahead.advance(p);

    const bool last_slice = now.slice + 1 == p.slices;
    Step next = now;
    next.next_item(p);
    const bool look_ahead = last_slice && next.tile < p.tiles;
    // At tap 0 each thread reads one entry of the next tile's places, at the next three of the patches around them.
    const int entry = thread + (now.tap ? now.tap - 1 : 0) * kThreads, entries = p.tile.units * (now.tap ? kTaps : 3);
    const bool reads = look_ahead && now.tap < kFindTap && entry < entries;
    int32_t read = -1;
    if (reads)
      read = now.tap ? read_around(p.patches, around.places, entry) : read_place(p.patches, p.tile, next.tile, entry);
    if (look_ahead && now.tap == kFindTap) find_rows(p.tile, around, next.tile);
    if (now.tap == kFindTap + 1 && (!last_slice || look_ahead))
      copy_halo<T, kPieces>(halos + (1 - buffer) * halo_bytes, source, around.rows, p.tile.halo, p.channels,
                            last_slice ? 0 : (now.slice + 1) * kDepth);
    commit_copies();

    __syncwarp();  // lanes copied different numbers of pieces; the instructions below are the whole warp's
    load(now, 1);
    multiply(0);

    if (reads) (now.tap ? around.around : around.places)[entry] = read;

    const Step done = now;
    now.advance(p);
    wait_copies<kAhead - 1>();
    __syncthreads();  // the next step's copies are there, for all threads
    if (now.tap == 0) buffer = 1 - buffer;
    if (now.tile < p.tiles) load(now, 0);

    multiply(1);

    if (now.tap || now.slice) continue;
    const int64_t first_row = done.tile * kRows + warp_row + lane / 4;
    const int first_column = done.panel * kColumns + warp_column;
    const int64_t rows = p.patches.count << p.tile.log_area;
#pragma unroll
    for (int group = 0; group < kWide; group += 4) {  // of 32 columns
      float biases[4][2] = {};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int column = first_column + 8 * (group + j) + 2 * (lane % 4);
        if (bias && column < p.columns) {
          biases[j][0] = to_float(bias[column]);
          biases[j][1] = to_float(bias[column + 1]);
        }
      }
      const int column = first_column + 8 * (group + lane % 4);
#pragma unroll
      for (int i = 0; i < 2 * kHigh; ++i) {
        uint32_t values[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float (&sum)[4] = sums[i / 2][group + j];
          values[j] = Pair<T>::pack(make_float2(sum[2 * (i % 2)] + biases[j][0], sum[2 * (i % 2) + 1] + biases[j][1]));
          sum[2 * (i % 2)] = sum[2 * (i % 2) + 1] = 0;
        }
        transpose_quad(values, lane);
        const int64_t row = first_row + 8 * i;
        if (row < rows && column < p.columns)
          *reinterpret_cast<uint4*>(out + row * p.columns + column) =
              make_uint4(values[0], values[1], values[2], values[3]);
      }
    }
  }
}

template <typename T, int kColumns>
void launch(Queue queue, const T* source, const T* weight, const T* bias, T* out, Problem p, int64_t bytes,
            const char* name) {
  const auto kernel = conv_gather_kernel<T, kColumns>;
  allow_shared(kernel, bytes, name);
  const int64_t multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount, queue.device, name);
  const int64_t blocks = std::min({p.tiles * p.panels, 2 * multiprocessors, int64_t{SPARK_MAX_BLOCKS}});
  p.stride_tiles = blocks / p.panels;
  p.stride_panels = static_cast<int>(blocks % p.panels);
  SPARK_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), bytes, stream_of(queue), source, weight,
               bias, out, p);
  check(cudaGetLastError(), name);
}

template <typename T>
void run(Queue queue, const T* source, const T* weight, const T* bias, T* out, Problem p, const char* name) {
  const DeviceGuard guard(queue.device, name);
  const int64_t most = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, queue.device, name);
  const auto bytes = [&](int64_t stages, int columns) {
    return stages * kDepth * columns * 2 + 2 * p.tile.halo * int64_t{kPieces * 16} + Surroundings::bytes(p.tile);
  };
  const int columns = p.columns > 64 && bytes(kLeastStages, 128) <= most ? 128 : 64;
  const int64_t steps = int64_t{kTaps} * p.slices;
  p.panels = (p.columns + columns - 1) / columns;
  p.tiles = ((p.patches.count << p.tile.log_area) + kRows - 1) / kRows;
  // A multiprocessor has a kilobyte more than a block of it may use. Two blocks shall fit.
  p.resident = p.panels == 1 && 2 * bytes(steps, columns) <= most - 1024;
  p.stages = p.resident ? static_cast<int>(steps) : kLeastStages;
  (columns == 128 ? launch<T, 128> : launch<T, 64>)(queue, source, weight, bias, out, p, bytes(p.stages, columns),
                                                    name);
}

}  // namespace gather

// Gradient of the weight. A block takes 64 channels of the source, 64 of the result and a range of tiles of 64 rows;
// its eight warps take 16 x 32 of these each, all nine taps.
namespace weight {

constexpr int kThreads = 256, kRows = 64;
constexpr int kPieces = 8, kPanel = kPieces * kPiece;

struct Problem {
  Tile tile;
  Patches patches;
  int channels = 0, columns = 0;
  int panels_across = 0;  // of the result's channels
  int64_t tiles = 0;
};

template <typename T>
__device__ void copy_grad(SharedAddress to, const T* grad, const Problem& p, int64_t number, int first) {
  const int64_t first_row = number * kRows, rows = p.patches.count << p.tile.log_area;
#pragma unroll
  for (int i = threadIdx.x; i < kRows * kPieces; i += kThreads) {
    const int row = i / kPieces, piece = i % kPieces, column = first + piece * kPiece;
    const bool exists = first_row + row < rows && column < p.columns;
    copy_async(to + piece_at<kPieces>(row, row, piece), exists ? grad + (first_row + row) * p.columns + column : grad,
               exists);
  }
}

// source [rows, channels], grad [rows, columns], partial [blocks along x, 9, channels, columns]
template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    conv_weight_kernel(const T* source, const T* grad, float* partial, const Problem p) {
  constexpr int kWide = 32 / 8, kGradBytes = kRows * kPieces * 16;
  SPARK_DYNAMIC_SHARED(unsigned char, shared);
  const int halo_bytes = p.tile.halo * kPieces * 16;
  const SharedAddress grads = shared_address(shared), halos = grads + 2 * kGradBytes;
  unsigned char* const tables = shared + 2 * kGradBytes + 2 * halo_bytes;
  const int table_bytes = static_cast<int>(Surroundings::bytes(p.tile));
  // Tiles of even and of odd numbers have their own, since several steps are under way at once.
  const auto around = [&](int64_t number) { return Surroundings::at(tables + (number & 1) * table_bytes, p.tile); };

  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int matrix = lane / 8, line = lane % 8;
  const int warp_channel = warp / 2 * 16, warp_column = warp % 2 * 32;
  const int first_channel = static_cast<int>(blockIdx.y) / p.panels_across * kPanel;
  const int first_column = static_cast<int>(blockIdx.y) % p.panels_across * kPanel;
  const int64_t begin = p.tiles * blockIdx.x / gridDim.x, end = p.tiles * (blockIdx.x + 1) / gridDim.x;

  const auto copy = [&](int64_t number) {
    const int64_t odd = number & 1;
    copy_halo<T, kPieces>(halos + odd * halo_bytes, source, around(number).rows, p.tile.halo, p.channels,
                          first_channel);
    copy_grad(grads + odd * kGradBytes, grad, p, number, first_column);
  };
  // Tile n's copies begin in step n - 1, its rows are found in n - 2, its patches in n - 3, its places in n - 4.
  find_surroundings(p.patches, p.tile, around(begin), begin, 3);
  copy(begin);
  commit_copies();
  find_surroundings(p.patches, p.tile, around(begin + 1), begin + 1, 3);
  find_surroundings(p.patches, p.tile, around(begin), begin + 2, 2);
  find_surroundings(p.patches, p.tile, around(begin + 1), begin + 3, 1);

  float sums[kTaps][kWide][4] = {};
  for (int64_t number = begin; number < end; ++number) {
    const int odd = static_cast<int>(number & 1);
    wait_copies<0>();
    __syncthreads();
    if (number + 1 < end) copy(number + 1);
    commit_copies();
    find_rows(p.tile, around(number), number + 2);
    int32_t patch = -1, place = -1;
    if (thread < p.tile.units * kTaps) patch = read_around(p.patches, around(number + 1).places, thread);
    if (thread < p.tile.units * 3) place = read_place(p.patches, p.tile, number + 4, thread);

    __syncwarp();
    const SharedAddress halo = halos + odd * halo_bytes, grad_rows = grads + odd * kGradBytes;
#pragma unroll 1
    for (int k = 0; k < kRows; k += 16) {
      uint32_t b[kWide / 2][4];
#pragma unroll
      for (int j = 0; j < kWide / 2; ++j)
        load_transposed(b[j], grad_rows + piece_at<kPieces>(k + 8 * (matrix & 1) + line, line,
                                                            warp_column / kPiece + 2 * j + matrix / 2));
      const int pixel = p.tile.first_pixel(k + 8 * (matrix / 2) + line);
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) {
        const int shift = tap / 3 * p.tile.pitch + tap % 3, key = line + tap / 3 * p.tile.side + tap % 3;
        uint32_t a[4];  // of the transposed source: channels x rows
        load_transposed(a, halo + piece_at<kPieces>(pixel + shift, key, warp_channel / kPiece + (matrix & 1)));
#pragma unroll
        for (int j = 0; j < kWide; ++j)
          multiply_add<T>(sums[tap][j], a, b[j / 2][2 * (j % 2)], b[j / 2][2 * (j % 2) + 1]);
      }
    }

    if (thread < p.tile.units * kTaps) around(number + 1).around[thread] = patch;
    if (thread < p.tile.units * 3) around(number).places[thread] = place;
  }

#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int channel = first_channel + warp_channel + lane / 4 + 8 * half;
      float* const to = partial + ((static_cast<int64_t>(blockIdx.x) * kTaps + tap) * p.channels + channel) * p.columns;
#pragma unroll
      for (int j = 0; j < kWide; ++j) {
        const int column = first_column + warp_column + 8 * j + 2 * (lane % 4);
        if (channel < p.channels && column < p.columns)
          *reinterpret_cast<float2*>(to + column) = make_float2(sums[tap][j][2 * half], sums[tap][j][2 * half + 1]);
      }
    }
}

constexpr int kGroups = 8;  // of partial sums, each added up in order and then one after the other

// out [columns, channels, 9] <- the sum over parts of partial [parts, 9, channels, columns]
template <typename T>
__global__ void __launch_bounds__(32 * kGroups)
    add_parts_kernel(const float* partial, T* out, int64_t parts, int64_t channels, int64_t columns) {
  SPARK_SHARED(float, groups, [kGroups][32]);
  const int64_t size = kTaps * channels * columns;
  const int64_t element = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x, group = threadIdx.y;
  float sum = 0;
  if (element < size) {
    const int64_t end = parts * (group + 1) / kGroups;
#pragma unroll 4
    for (int64_t part = parts * group / kGroups; part < end; ++part) sum += partial[part * size + element];
  }
  groups[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y || element >= size) return;
  for (int other = 1; other < kGroups; ++other) sum += groups[other][threadIdx.x];
  const int64_t column = element % columns, channel = element / columns % channels, tap = element / columns / channels;
  out[(column * channels + channel) * kTaps + tap] = from_float<T>(sum);
}

template <typename T>
void run(Queue queue, const T* source, const T* grad, float* partial, T* out, const Problem& p, int64_t parts,
         const char* name) {
  const int64_t bytes = 2 * (p.tile.halo + kRows) * int64_t{kPieces * 16} + 2 * Surroundings::bytes(p.tile);
  const int64_t panels = static_cast<int64_t>(p.panels_across) * ((p.channels + kPanel - 1) / kPanel);
  const DeviceGuard guard(queue.device, name);
  const auto kernel = conv_weight_kernel<T>;
  allow_shared(kernel, bytes, name);
  SPARK_LAUNCH(kernel, dim3(static_cast<unsigned>(parts), static_cast<unsigned>(panels)), dim3(kThreads), bytes,
               stream_of(queue), source, grad, partial, p);
  check(cudaGetLastError(), name);
  const int64_t elements = int64_t{kTaps} * p.channels * p.columns;
  SPARK_LAUNCH(add_parts_kernel<T>, dim3(static_cast<unsigned>((elements + 31) / 32)), dim3(32, kGroups), 0,
               stream_of(queue), partial, out, parts, p.channels, p.columns);
  check(cudaGetLastError(), name);
}

}  // namespace weight

Patches patches_of(const PatchMap& map) {
  return {map.coords, map.grid_to_patch, map.patches, static_cast<int>(map.gh), static_cast<int>(map.gw)};
}

int64_t weight_tiles(const PatchMap& map) {
  return (map.patches * map.height * map.width + weight::kRows - 1) / weight::kRows;
}

void check_shape(const char* kernel, const PatchMap& map, int64_t channels, int64_t columns) {
  const int64_t side = map.height;
  const bool power = side == map.width && side >= 2 && side <= 16 && !(side & (side - 1));
  const auto fits = [](int64_t count) {
    return count > 0 && count % kPiece == 0 && count <= std::numeric_limits<int>::max() / 2;
  };
  if (!power || !fits(channels) || !fits(columns))
    throw std::invalid_argument(std::string(kernel) + ": patches of " + std::to_string(map.height) + "x" +
                                std::to_string(map.width) + " pixels, " + std::to_string(channels) + " and " +
                                std::to_string(columns) +
                                " channels; it takes sides 2, 4, 8 and 16 and multiples of 8 channels");
}

// Calls run(T{}) with the type of half precision that `type` names.
template <typename Run>
void with_half(FloatType type, const char* kernel, Run run) {
  if (type == FloatType::kFloat16) return run(__half{});
  if (type == FloatType::kBFloat16) return run(__nv_bfloat16{});
  throw std::invalid_argument(std::string(kernel) + ": type " + std::to_string(static_cast<int>(type)) +
                              "; it takes 1 (float16) and 2 (bfloat16)");
}

}  // namespace

void conv_gather(Queue queue, FloatType type, const PatchMap& map, int64_t channels, int64_t columns, bool turned,
                 const void* source, const void* weight, const void* bias, void* out) {
  const char* name = "conv_gather";
  check_shape(name, map, channels, columns);
  if (map.patches == 0) return;
  gather::Problem p{Tile(gather::kRows, static_cast<int>(map.height)), patches_of(map)};
  p.channels = static_cast<int>(channels);
  p.columns = static_cast<int>(columns);
  p.slices = (p.channels + gather::kDepth - 1) / gather::kDepth;
  p.turned = turned;
  with_half(type, name, [&](auto element) {
    using T = decltype(element);
    gather::run(queue, static_cast<const T*>(source), static_cast<const T*>(weight), static_cast<const T*>(bias),
                static_cast<T*>(out), p, name);
  });
}

int64_t conv_weight_parts(int device, const PatchMap& map, int64_t channels, int64_t columns) {
  const auto panels = [](int64_t count) { return (count + weight::kPanel - 1) / weight::kPanel; };
  const int64_t parts = device_attribute(cudaDevAttrMultiProcessorCount, device, "conv_weight_parts") /
                        std::max<int64_t>(panels(channels) * panels(columns), 1);
  return std::max<int64_t>(std::min(parts, weight_tiles(map)), 1);
}

void conv_weight(Queue queue, FloatType type, const PatchMap& map, int64_t channels, int64_t columns,
                 const void* source, const void* grad, float* partial, int64_t parts, void* out) {
  const char* name = "conv_weight";
  check_shape(name, map, channels, columns);
  weight::Problem p{Tile(weight::kRows, static_cast<int>(map.height)), patches_of(map)};
  p.channels = static_cast<int>(channels);
  p.columns = static_cast<int>(columns);
  p.panels_across = (p.columns + weight::kPanel - 1) / weight::kPanel;
  p.tiles = weight_tiles(map);
  if (parts < 1 || parts > p.tiles)
    throw std::invalid_argument("conv_weight: parts must be between 1 and " + std::to_string(p.tiles) + "; got " +
                                std::to_string(parts));
  with_half(type, name, [&](auto element) {
    using T = decltype(element);
    weight::run(queue, static_cast<const T*>(source), static_cast<const T*>(grad), partial, static_cast<T*>(out), p,
                parts, name);
  });
}

}  // namespace spark
