// Scratch memory of a thread, kept from call to call: a `static thread_local Scratch` at the place that uses it.
#pragma once
#include <cstdlib>

namespace fn {

inline size_t line(size_t n) { return (n + 63) & ~size_t(63); }  // whole cache lines

class Scratch {
  public:
    ~Scratch() { free(memory_); }

    char* reserve(size_t n) {  // at least n bytes, whose contents are undefined
        if (n > size_) {
            free(memory_);
            memory_ = static_cast<char*>(aligned_alloc(64, line(n)));
            if (!memory_) abort();
            size_ = n;
        }
        return memory_;
    }

  private:
    char* memory_ = nullptr;
    size_t size_ = 0;
};

}  // namespace fn
