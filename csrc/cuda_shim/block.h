// One block of a kernel on one CPU thread. Its threads are fibers that change over at barriers only; a block without
// barriers runs through without a change. What a GPU leaves undefined or would hang on is an error here: a barrier that
// not all threads reach, a warp operation whose mask names a thread that does not take part, shared memory overrun.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <new>
#include <string>
#include <utility>
#include <vector>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace spark_shim {

constexpr int kWarp = 32;
constexpr uint8_t kPoison = 0xFF;  // NaN in every floating point type

// 0, 1, ..., n - 1 in an order of the test's choice: 0 forward, 1 backward, else shuffled by this seed.
inline std::vector<uint32_t> ordered(uint32_t n, int64_t order) {
  std::vector<uint32_t> places(n);
  for (uint32_t i = 0; i < n; ++i) places[i] = order == 1 ? n - 1 - i : i;
  uint64_t state = static_cast<uint64_t>(order) * 0x9E3779B97F4A7C15u + 1;
  if (order > 1)
    for (uint32_t i = n; i > 1; --i) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      std::swap(places[i - 1], places[(state >> 33) % i]);
    }
  return places;
}

// A stack with a page below it that cannot be touched.
class Stack {
 public:
  static constexpr size_t kBytes = 256 * 1024;

  Stack() : page_(static_cast<size_t>(sysconf(_SC_PAGESIZE))) {
    memory_ = mmap(nullptr, page_ + kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory_ == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory_, page_, PROT_NONE);
  }
  ~Stack() { munmap(memory_, page_ + kBytes); }
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;

  void* begin() const { return static_cast<char*>(memory_) + page_; }

 private:
  size_t page_;
  void* memory_;
};

// Shared memory of a block: poisoned before it starts, each array followed by a margin that must stay as it is.
class SharedMemory {
 public:
  static constexpr size_t kMargin = 256, kAlign = 128;

  void reset(size_t dynamic_bytes) {
    arrays_.clear();
    total_ = 0;
    dynamic_ = take(nullptr, dynamic_bytes);
  }

  void* dynamic() const { return dynamic_; }

  // The array of the declaration `key`, the same for all threads.
  void* array(const void* key, size_t bytes) {
    for (Array& array : arrays_)
      if (array.key == key) return array.begin;
    return take(key, bytes);
  }

  size_t total() const { return total_; }

  bool intact() const {
    for (const Array& array : arrays_)
      for (size_t i = 0; i < kMargin; ++i)
        if (array.begin[array.bytes + i] != kPoison || array.memory[i] != kPoison) return false;
    return true;
  }

 private:
  struct Array {
    const void* key;
    std::unique_ptr<uint8_t[]> memory;
    uint8_t* begin;
    size_t bytes;
  };

  void* take(const void* key, size_t bytes) {
    const size_t all = bytes + 2 * kMargin + kAlign;
    std::unique_ptr<uint8_t[]> memory(new uint8_t[all]);
    std::memset(memory.get(), kPoison, all);
    const uintptr_t first = reinterpret_cast<uintptr_t>(memory.get()) + kMargin + kAlign - 1;
    uint8_t* begin = reinterpret_cast<uint8_t*>(first / kAlign * kAlign);
    arrays_.push_back({key, std::move(memory), begin, bytes});
    total_ += bytes;
    return begin;
  }

  std::vector<Array> arrays_;
  void* dynamic_ = nullptr;
  size_t total_ = 0;
};

class Block {
 public:
  // Runs `kernel` once for each thread of blockDim. Returns what went wrong, or an empty string.
  std::string run(const std::function<void()>& kernel, size_t dynamic_bytes, int64_t order) {
    kernel_ = &kernel;
    order_ = order;
    shared.reset(dynamic_bytes);
    threads_.assign(blockDim.x * blockDim.y * blockDim.z, Thread{});
    starts_ = ordered(static_cast<uint32_t>(threads_.size()), order_);
    started_ = 0;
    ready_.clear();
    std::string problem;
    while (problem.empty()) {
      if (!ready_.empty()) {
        current_ = ready_.front();
        ready_.pop_front();
        resume(thread().fiber);
      } else if (started_ < starts_.size()) {
        resume(idle());
      } else if (all_done()) {
        break;
      } else {
        problem = release_barrier();
        continue;
      }
      if (thread().where == kAtExchange) release_warp(current_ / kWarp * kWarp, thread().mask);
    }
    if (!problem.empty()) abandon();
    if (problem.empty() && !shared.intact()) problem = "shared memory was written outside its arrays";
    return problem;
  }

  void barrier(int line) {
    thread().line = line;
    wait(kAtBarrier);
    ++barriers;
  }

  // Waits for the lanes of `mask`; returns 32 values of `bytes` each, poison for lanes outside the mask. They stay
  // valid until this thread's next exchange.
  const uint8_t* exchange(unsigned mask, const void* mine, size_t bytes) {
    Thread& self = thread();
    self.mask = mask;
    const auto* first = static_cast<const uint8_t*>(mine);
    self.given.assign(first, first + bytes);
    wait(kAtExchange);
    return thread().seen->data();
  }

  int lane() const { return static_cast<int>(current_ % kWarp); }

  SharedMemory shared;
  int64_t barriers = 0;  // arrivals of threads

 private:
  enum Where { kNew, kReady, kRunning, kAtBarrier, kAtExchange, kDone };

  struct Fiber {
    Stack stack;
    ucontext_t context;
  };

  struct Thread {
    Where where = kNew;
    Fiber* fiber = nullptr;
    int line = 0;
    unsigned mask = 0;
    std::vector<uint8_t> given;
    std::shared_ptr<std::vector<uint8_t>> seen;
  };

  Thread& thread() { return threads_[current_]; }

  bool all_done() const {
    for (const Thread& thread : threads_)
      if (thread.where != kDone) return false;
    return true;
  }

  // Lets the lanes of `mask` go on if all of them wait in the same exchange. They go first, so that a warp runs ahead
  // of the others as far as it can, or, in every other shuffle, last.
  void release_warp(size_t first, unsigned mask) {
    for (size_t lane = 0; lane < kWarp; ++lane) {
      if (!(mask >> lane & 1)) continue;
      if (first + lane >= threads_.size()) return;
      const Thread& peer = threads_[first + lane];
      if (peer.where != kAtExchange || peer.mask != mask || peer.given.size() != thread().given.size()) return;
    }
    const size_t bytes = thread().given.size();
    const auto all = std::make_shared<std::vector<uint8_t>>(kWarp * bytes, kPoison);
    std::vector<uint32_t> lanes;
    for (uint32_t lane : ordered(kWarp, order_)) {
      if (!(mask >> lane & 1)) continue;
      Thread& peer = threads_[first + lane];
      std::copy(peer.given.begin(), peer.given.end(), all->begin() + lane * bytes);
      peer.seen = all;
      peer.where = kReady;
      lanes.push_back(static_cast<uint32_t>(first) + lane);
    }
    ready_.insert(order_ > 1 && order_ % 2 ? ready_.end() : ready_.begin(), lanes.begin(), lanes.end());
  }

  // Nothing else can go on: lets all threads pass the barrier if all are there. Returns what is wrong, or nothing.
  std::string release_barrier() {
    size_t waiting = 0;
    int line = 0;
    for (size_t i = 0; i < threads_.size(); ++i) {
      if (threads_[i].where == kAtExchange) return stuck_exchange(i);
      if (threads_[i].where != kAtBarrier) continue;
      if (waiting && threads_[i].line != line)
        return "threads of a block wait at different barriers, in lines " + std::to_string(line) + " and " +
               std::to_string(threads_[i].line);
      line = threads_[i].line;
      ++waiting;
    }
    if (waiting != threads_.size())
      return "only " + std::to_string(waiting) + " of " + std::to_string(threads_.size()) +
             " threads reached the barrier in line " + std::to_string(line);
    if (order_ > 1) ++order_;  // another shuffle for the next stretch
    for (uint32_t place : ordered(static_cast<uint32_t>(threads_.size()), order_)) {
      threads_[place].where = kReady;
      ready_.push_back(place);
    }
    return {};
  }

  std::string stuck_exchange(size_t place) const {
    const Thread& self = threads_[place];
    const size_t first = place / kWarp * kWarp;
    if (!(self.mask >> (place - first) & 1)) return "a warp operation was called by a thread outside its mask";
    for (size_t lane = 0; lane < kWarp; ++lane) {
      if (!(self.mask >> lane & 1)) continue;
      const bool exists = first + lane < threads_.size();
      if (!exists || threads_[first + lane].where == kDone)
        return "a warp operation's mask names a thread that " + std::string(exists ? "has ended" : "is not there");
    }
    return "lanes of a warp wait for one another in different operations";
  }

  // On a fiber: runs threads that have not started; one that waits leaves the rest to another fiber.
  static void work(unsigned low, unsigned high) {
    auto* block = reinterpret_cast<Block*>(static_cast<uintptr_t>(low) | static_cast<uintptr_t>(high) << 32);
    for (;;) {
      Fiber* const fiber = block->running_;
      while (block->started_ < block->starts_.size()) block->start(fiber);
      block->idle_.push_back(fiber);
      swapcontext(&fiber->context, &block->main_);
    }
  }

  void start(Fiber* fiber) {
    current_ = starts_[started_++];
    thread().fiber = fiber;
    thread().where = kRunning;
    place();
    (*kernel_)();
    thread().where = kDone;
  }

  void place() {
    threadIdx = dim3(current_ % blockDim.x, current_ / blockDim.x % blockDim.y, current_ / (blockDim.x * blockDim.y));
  }

  void wait(Where where) {
    Fiber* const fiber = thread().fiber;
    thread().where = where;
    swapcontext(&fiber->context, &main_);
    place();
    thread().where = kRunning;
  }

  Fiber* idle() {
    if (idle_.empty()) {
      fibers_.emplace_back(new Fiber);
      prepare(fibers_.back().get());
      return fibers_.back().get();
    }
    Fiber* const fiber = idle_.back();
    idle_.pop_back();
    return fiber;
  }

  void prepare(Fiber* fiber) {
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->stack.begin();
    fiber->context.uc_stack.ss_size = Stack::kBytes;
    fiber->context.uc_link = nullptr;
    const auto self = reinterpret_cast<uintptr_t>(this);
    makecontext(&fiber->context, reinterpret_cast<void (*)()>(&Block::work), 2, static_cast<unsigned>(self),
                static_cast<unsigned>(self >> 32));
  }

  void resume(Fiber* fiber) {
    running_ = fiber;
    swapcontext(&main_, &fiber->context);
  }

  // Leaves the threads that wait where they are; their fibers start afresh.
  void abandon() {
    idle_.clear();
    for (auto& fiber : fibers_) {
      prepare(fiber.get());
      idle_.push_back(fiber.get());
    }
  }

  const std::function<void()>* kernel_ = nullptr;
  int64_t order_ = 0;
  std::vector<Thread> threads_;
  std::vector<uint32_t> starts_;
  size_t started_ = 0;
  std::deque<uint32_t> ready_;  // to go on, in this order
  uint32_t current_ = 0;
  Fiber* running_ = nullptr;
  std::vector<Fiber*> idle_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  ucontext_t main_;
};

inline Block& block() {
  static Block only;
  return only;
}

}  // namespace spark_shim
