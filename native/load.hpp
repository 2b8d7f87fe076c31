// Reading a `.sfold` file (docs/file-format.md). The file is untrusted: whatever is wrong with it ends in a LoadError.
#pragma once
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "program.hpp"

namespace sparsefold {

/// A file that is not a program this version can play; `offset` is the byte at which that was seen.
class LoadError : public std::runtime_error {
  public:
    LoadError(const std::string& message, uint64_t at)
        : std::runtime_error(message + " (at byte " + std::to_string(at) + ")"), offset(at) {}
    uint64_t offset;
};

/// The program that `size` bytes at `data` hold; nothing of them is kept. Throws LoadError, or std::bad_alloc.
Program load_program(const void* data, size_t size);

uint32_t crc32(const void* data, size_t size);

}  // namespace sparsefold
