#include "program.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <type_traits>

namespace sparsefold {

namespace {

std::string number(uint64_t n) { return std::to_string(n); }

[[noreturn]] void refuse(const std::string& why) { throw std::invalid_argument(why); }

/// 1 over the scale of a row, so that what is packed is its codes.
float unscaled(const MatrixView& view, uint32_t row) {
    return view.int8() && !view.coded ? 1.0f / view.scale[row] : 1.0f;
}

uint32_t ceil_div(uint32_t a, uint32_t b) { return a / b + (a % b != 0); }

/// (gates * units) floats with every gate padded to whole vectors.
Buffer<float> padded(const float* values, uint32_t gates, uint32_t units) {
    Buffer<float> out(size_t{gates} * pad(units));
    for (uint32_t g = 0; g < gates; ++g)
        std::memcpy(out.data() + size_t{g} * pad(units), values + size_t{g} * units, units * sizeof(float));
    return out;
}

/// visit(row, column, value) of all that a matrix of one gate stores; padding counts as its last row or column.
template <class Visit>
void each_element(const MatrixView& view, const Visit& visit) {
    const auto at = [&](uint64_t row, uint64_t column, float value) {
        visit(std::min<uint64_t>(row, view.rows - 1), std::min<uint64_t>(column, view.cols - 1), value);
    };
    const float* value = view.values;
    switch (view.format) {
        case MatrixView::Format::dense:
            for (uint32_t r = 0; r < view.rows; ++r)
                for (uint32_t c = 0; c < view.cols; ++c) at(r, c, *value++);
            return;
        case MatrixView::Format::block:
            for (uint64_t c = 0; c * view.block_cols < view.cols; ++c)
                for (uint64_t k = view.start[c]; k < view.start[c + 1]; ++k)
                    for (uint32_t j = 0; j < view.block_cols; ++j)
                        for (uint32_t i = 0; i < view.block_rows; ++i)
                            at(uint64_t{view.block_row[k]} * view.block_rows + i, c * view.block_cols + j, *value++);
            return;
        case MatrixView::Format::complementary:
            const uint32_t sets = ceil_div(view.rows, view.overlay);
            for (uint32_t c = 0; c < view.cols; ++c)
                for (uint32_t s = 0; s < sets; ++s)
                    at(uint64_t{view.live[size_t{c} * sets + s]} * sets + s, c, *value++);
    }
}

/// Dense x of `n` streams.
struct Batch {
    size_t n;
    const float* const* x;
};

// A packed matrix as a sequence of packed matrices of about kPieceBytes of weights, for the same kernels:
// visit(piece, its first column, its first row). No sum of any row changes its order by it.
constexpr size_t kPieceBytes = 16 << 10;  // half of the smallest first-level cache; x and y take the rest

/// Whole panels keep one sum a row and may stop between columns; narrower ones keep several and do not.
template <class Value, class Visit>
void in_pieces(const Dense<Value>& w, const Visit& visit) {
    for (uint32_t row = 0; row < w.rows; row += kPanel) {
        const uint32_t width = std::min(w.rows - row, kPanel);
        const uint32_t step = width < kPanel ? w.cols : static_cast<uint32_t>(kPieceBytes / (kPanel * sizeof(Value)));
        const Value* const panel = w.values + size_t{row} * w.cols;
        for (uint32_t c = 0; c < w.cols; c += step)
            visit(Dense<Value>{panel + size_t{c} * width, width, std::min(w.cols - c, step)}, c, row);
    }
}

/// The first after `from` at which what lies between `start`s fills a piece of `bytes` each, or `count`.
uint32_t piece_end(const uint32_t* start, uint32_t from, uint32_t count, size_t bytes) {
    uint32_t to = from + 1;
    while (to < count && (start[to] - start[from]) * bytes < kPieceBytes) ++to;
    return to;
}

template <class Value, class Visit>
void in_pieces(const Block<Value>& w, const Visit& visit) {
    Block<Value> piece = w;
    for (uint32_t c = 0, end; c < w.cols; c = end) {
        end = piece_end(w.start, c, w.cols, w.height * sizeof(Value));
        piece.start = w.start + c;
        piece.cols = end - c;
        visit(piece, c, 0);
    }
}

template <class Strips, class Visit>
void in_strips(const Strips& w, size_t vector_bytes, const Visit& visit) {
    for (uint32_t p = 0, end; p < w.strips; p = end) {
        end = piece_end(w.start, p, w.strips, vector_bytes);
        Strips piece = w;
        piece.start += p;
        if (piece.scale) piece.scale += p * w.height;
        piece.strips = end - p;
        visit(piece, p);
    }
}

template <class Value, class Visit>
void in_pieces(const Rows<Value>& w, const Visit& visit) {
    in_strips(w, kLanes * sizeof(Value), [&](Rows<Value>& piece, uint32_t p) {
        if (piece.tail) piece.tail += p;
        visit(piece, 0, p * w.height);
    });
}

template <class Visit>
void in_pieces(const RowsOfCodes& w, const Visit& visit) {
    in_strips(w, 4 * kLanes, [&](RowsOfCodes& piece, uint32_t p) {
        if (piece.marks) {
            piece.marks += size_t{p} * w.words;
            piece.added += p * w.height;
        }
        visit(piece, 0, p * w.height);
    });
}

/// One gate each: its sums begin at zero, so that columns cannot be parted.
template <class Value, class Visit>
void in_pieces(const Complementary<Value>& w, const Visit& visit) {
    Complementary<Value> piece = w;
    piece.gates = 1;
    const size_t size = size_t{ceil_div(w.sets, kLanes)} * w.cols * kLanes;
    for (uint32_t g = 0; g < w.gates; ++g, piece.values += size, piece.live += size) visit(piece, 0, g * pad(w.units));
}

}  // namespace

Matrix::Matrix(const MatrixView& view, Reads reads, uint32_t first_gate, uint32_t last_gate)
    : format_(view.format), cols_(view.cols), precision_(view.precision) {
    constexpr uint32_t limit = 1u << 28;
    if (view.gates == 0 || view.rows % view.gates)
        refuse("a matrix of " + number(view.rows) + " rows cannot have " + number(view.gates) +
               " gates of equal size.");
    if (view.rows > limit || view.cols > limit)
        refuse("a matrix of " + number(view.rows) + " x " + number(view.cols) +
               " is larger than 2^28 rows or columns.");
    if (first_gate >= last_gate || last_gate > view.gates) refuse("gate range out of bounds.");
    if (precision_ == MatrixView::Precision::w8a8 && reads == Reads::events)
        refuse("a product that reads events takes them as they are: its weights are i8, not w8a8.");
    if (view.int8())
        for (uint32_t row = 0; row < view.rows; ++row)
            if (!(view.scale[row] > 0 && std::isfinite(view.scale[row])))
                refuse("the scale of row " + number(row) + " is not a positive number.");
    if (uint64_t{view.gates} * pad(view.rows / view.gates) > uint64_t{limit} * 3)
        refuse("a matrix of " + number(view.gates) + " gates is too large once every gate is padded to whole vectors.");
    gates_ = last_gate - first_gate;
    rows_ = gates_ * (view.rows / view.gates);
    switch (format_) {
        case MatrixView::Format::dense:
            pack_dense(view, first_gate);
            break;
        case MatrixView::Format::block:
            pack_block(view, first_gate, reads);
            break;
        case MatrixView::Format::complementary:
            pack_complementary(view, first_gate);
            break;
    }
    narrow(view, first_gate);
}

void Matrix::pack_dense(const MatrixView& view, uint32_t first_gate) {
    const uint32_t units = view.rows / view.gates, total = padded_rows();
    if (precision_ == MatrixView::Precision::w8a8)
        return pack_rows(view, [&](auto&& visit) {
            for (uint32_t g = 0; g < gates_; ++g)
                for (uint32_t i = 0; i < units; i += kLanes)
                    for (uint32_t c = 0; c < cols_; ++c) {
                        const uint32_t first = (first_gate + g) * units + i;
                        visit(c, g * pad(units) + i, std::min(kLanes, units - i), first,
                              view.values + size_t{first} * cols_ + c, cols_);
                    }
        });
    values_ = Buffer<float>(size_t{total} * cols_);
    for (uint32_t g = 0; g < gates_; ++g)
        for (uint32_t i = 0; i < units; ++i) {
            const float* source = view.values + (size_t{first_gate + g} * units + i) * cols_;
            const uint32_t row = g * pad(units) + i, panel = row / kPanel * kPanel;
            const uint32_t width = total - panel < kPanel ? total - panel : kPanel;
            float* target = values_.data() + size_t{panel} * cols_ + (row - panel);
            const float unscale = unscaled(view, (first_gate + g) * units + i);
            for (uint32_t c = 0; c < cols_; ++c) target[size_t{c} * width] = source[c] * unscale;
        }
}

void Matrix::pack_block(const MatrixView& view, uint32_t first_gate, Reads reads) {
    const uint32_t br = view.block_rows, bc = view.block_cols, units = view.rows / view.gates;
    if (br == 0 || bc == 0 || br > 64 || bc > 64)
        refuse("a block of " + number(br) + " x " + number(bc) + " is not between 1 x 1 and 64 x 64.");
    const uint32_t block_columns = ceil_div(cols_, bc), per_gate = ceil_div(units, br);
    uint64_t previous = 0;
    for (uint32_t b = 0; b <= block_columns; ++b) {
        if (view.start[b] < previous || view.start[b] > view.blocks)
            refuse("start[" + number(b) + "] = " + number(view.start[b]) + " of a block matrix is not between " +
                   number(previous) + " and the number of blocks, " + number(view.blocks) + ".");
        previous = view.start[b];
    }
    if (view.start[0] != 0 || previous != view.blocks)
        refuse("the block columns of a block matrix cover blocks " + number(view.start[0]) + " to " + number(previous) +
               ", but it stores " + number(view.blocks) + ".");
    for (uint32_t b = 0; b < block_columns; ++b)
        for (uint64_t k = view.start[b]; k < view.start[b + 1]; ++k) {
            if (view.block_row[k] >= uint64_t{per_gate} * view.gates)
                refuse("block row " + number(view.block_row[k]) + " is out of range; the matrix has " +
                       number(uint64_t{per_gate} * view.gates) + " block rows.");
            if (k > view.start[b] && view.block_row[k] <= view.block_row[k - 1])
                refuse("the block rows of block column " + number(b) + " are not ascending.");
        }

    const bool whole = br % kLanes == 0, divides = whole || kLanes % br == 0;
    by_rows_ = reads == Reads::dense && (divides || view.precision == MatrixView::Precision::w8a8);
    height_ = whole ? kLanes : by_rows_ && !divides ? 1 : br;
    // visit(column, row and rows of the packed matrix, row of the unpacked one, values, distance of two rows' values)
    const auto segments = [&](auto&& visit) {
        for (uint32_t c = 0; c < cols_; ++c)
            for (uint64_t k = view.start[c / bc]; k < view.start[c / bc + 1]; ++k) {
                const uint32_t gate = view.block_row[k] / per_gate, top = view.block_row[k] % per_gate * br;
                if (gate < first_gate || gate >= first_gate + gates_) continue;
                for (uint32_t i = 0; i < br && top + i < units; i += height_)
                    visit(c, (gate - first_gate) * pad(units) + top + i, std::min(height_, units - top - i),
                          gate * units + top + i, view.values + (size_t{k} * bc + c % bc) * br + i, 1);
            }
    };
    if (by_rows_) return pack_rows(view, segments);
    uint64_t count = 0;
    segments([&](auto...) { ++count; });
    if (count > std::numeric_limits<uint32_t>::max()) refuse("a block matrix has more than 2^32 segments.");
    pack_columns(view, segments, count);
}

template <class Segments>
void Matrix::pack_columns(const MatrixView& view, const Segments& segments, size_t count) {
    start_ = Buffer<uint32_t>(size_t{cols_} + 1);
    values_ = Buffer<float>(count * height_);
    const bool narrow = padded_rows() <= 1u << 16;
    index16_ = Buffer<uint16_t>(narrow ? count : 0);
    index32_ = Buffer<uint32_t>(narrow ? 0 : count);
    const bool by_hand = height_ == 1 || height_ == 4 || height_ == 8 || height_ == kLanes;
    length_ = Buffer<uint32_t>(by_hand ? 0 : count);
    uint32_t s = 0;
    segments([&](uint32_t c, uint32_t row, uint32_t length, uint32_t first, const float* values, size_t) {
        if (narrow)
            index16_[s] = static_cast<uint16_t>(row);
        else
            index32_[s] = row;
        if (length_.size()) length_[s] = length;
        for (uint32_t i = 0; i < length; ++i) values_[size_t{s} * height_ + i] = values[i] * unscaled(view, first + i);
        start_[size_t{c} + 1] = ++s;
    });
    for (uint32_t c = 0; c < cols_; ++c)
        if (start_[c + 1] < start_[c]) start_[c + 1] = start_[c];
}

template <class Segments>
void Matrix::pack_rows(const MatrixView& view, const Segments& segments) {
    by_rows_ = true;
    // Codes of x are multiplied four at a time: as many columns stand side by side.
    const uint32_t side = precision_ == MatrixView::Precision::w8a8 ? 4 : 1;
    const uint32_t strips = padded_rows() / height_, columns = side * kLanes / height_;
    const uint32_t whole = side == 1 ? columns : std::max(columns, kCodeColumns);
    std::vector<uint32_t> used(strips);
    uint64_t vectors = 0;
    segments([&](uint32_t, uint32_t row, auto...) { ++used[row / height_]; });
    start_ = Buffer<uint32_t>(size_t{strips} + 1);
    for (uint32_t p = 0; p < strips; ++p) {
        vectors += ceil_div(used[p], whole) * (whole / columns);
        if (vectors > std::numeric_limits<uint32_t>::max()) refuse("a matrix has more than 2^32 vectors.");
        start_[p + 1] = static_cast<uint32_t>(vectors);
    }
    values_ = Buffer<float>(vectors * side * kLanes);
    const bool all = format_ == MatrixView::Format::dense, narrow = cols_ <= 1u << 16;
    index16_ = Buffer<uint16_t>(narrow && !all ? vectors * columns : 0);
    index32_ = Buffer<uint32_t>(narrow || all ? 0 : vectors * columns);
    tail_ = Buffer<uint16_t>(side == 1 && columns > 1 ? strips : 0);
    const size_t words = ceil_div(cols_, 64);
    if (side == 4 && height_ == kLanes && !all && cols_ <= kMarkedColumns) marks_ = Buffer<uint64_t>(strips * words);
    std::fill(used.begin(), used.end(), 0);
    segments([&](uint32_t c, uint32_t row, uint32_t length, uint32_t first, const float* values, size_t distance) {
        const uint32_t p = row / height_, in_strip = used[p]++, at = in_strip % columns;
        const size_t vector = start_[p] + in_strip / columns;
        float* const lanes = values_.data() + (vector * columns + at / side * side) * height_ + at % side;
        for (uint32_t i = 0; i < length; ++i)
            lanes[size_t{i} * side] = values[i * distance] * unscaled(view, first + i);
        if (tail_.size()) tail_[p] = static_cast<uint16_t>((1u << (at + 1) * height_) - 1);
        if (all) return;
        if (marks_.size()) marks_[p * words + c / 64] |= uint64_t{1} << c % 64;
        if (narrow)
            index16_[vector * columns + at] = static_cast<uint16_t>(c);
        else
            index32_[vector * columns + at] = c;
    });
}

void Matrix::pack_complementary(const MatrixView& view, uint32_t first_gate) {
    const uint32_t units = view.rows / view.gates;
    overlay_ = view.overlay;
    if (overlay_ < 1 || overlay_ > 64) refuse("an overlay of " + number(overlay_) + " is not between 1 and 64.");
    sets_ = ceil_div(units, overlay_);
    const auto elements = [&](auto&& visit) {  // visit(column, gate, set, where it is stored, row of the gate)
        for (uint32_t c = 0; c < cols_; ++c)
            for (uint32_t g = 0; g < gates_; ++g)
                for (uint32_t s = 0; s < sets_; ++s) {
                    const size_t from = (size_t{c} * view.gates + first_gate + g) * sets_ + s;
                    if (view.live[from] >= overlay_)
                        refuse("a set of a complementary matrix keeps row " + number(view.live[from]) + " of " +
                               number(overlay_) + ".");
                    const uint64_t row = uint64_t{view.live[from]} * sets_ + s;
                    if (row < units) visit(c, g, s, from, static_cast<uint32_t>(row));  // else nothing is there
                }
    };
    if (precision_ == MatrixView::Precision::w8a8) {
        height_ = 1;
        return pack_rows(view, [&](auto&& visit) {
            elements([&](uint32_t c, uint32_t g, uint32_t, size_t from, uint32_t row) {
                visit(c, g * pad(units) + row, 1, (first_gate + g) * units + row, view.values + from, 1);
            });
        });
    }
    const uint32_t tiles = ceil_div(sets_, kLanes);
    values_ = Buffer<float>(size_t{gates_} * tiles * cols_ * kLanes);
    live_ = Buffer<uint8_t>(values_.size());
    std::memset(live_.data(), kNoGroup, live_.size());
    elements([&](uint32_t c, uint32_t g, uint32_t s, size_t from, uint32_t row) {
        const size_t to = ((size_t{g} * tiles + s / kLanes) * cols_ + c) * kLanes + s % kLanes;
        values_[to] = view.values[from] * unscaled(view, (first_gate + g) * units + row);
        live_[to] = view.live[from];
    });
}

void Matrix::narrow(const MatrixView& view, uint32_t first_gate) {
    if (precision_ == MatrixView::Precision::bf16) {
        halves_ = Buffer<bf16>(values_.size());
        for (size_t i = 0; i < values_.size(); ++i) {
            uint32_t bits;
            std::memcpy(&bits, &values_[i], sizeof bits);
            halves_[i].bits = static_cast<uint16_t>(bits >> 16);
        }
        values_ = Buffer<float>();
    } else if (view.int8()) {
        codes_ = Buffer<int8_t>(values_.size());
        for (size_t i = 0; i < values_.size(); ++i) {
            const float code = std::nearbyint(values_[i]);
            if (!(code >= -127 && code <= 127)) refuse("a weight is more than 127 times the scale of its row.");
            codes_[i] = static_cast<int8_t>(code);
        }
        values_ = Buffer<float>();
        added_ = Buffer<int32_t>(marks_.size() ? padded_rows() : 0);
        if (added_.size())
            for (uint32_t p = 0; p + 1 < start_.size(); ++p)
                for (size_t i = size_t{start_[p]} * 4 * kLanes; i < size_t{start_[p + 1]} * 4 * kLanes; ++i)
                    added_[p * kLanes + i / 4 % kLanes] += 128 * codes_[i];
        const uint32_t units = rows_ / gates_;
        scale_ = Buffer<float>(padded_rows());
        for (uint32_t row = 0; row < padded_rows(); ++row) {
            const uint32_t g = row / pad(units), i = row % pad(units);
            scale_[row] = i < units ? view.scale[(first_gate + g) * units + i] : 1.0f;
        }
    }
}

/// y += W x, of int8 the codes where these are `scaled_behind`.
template <class X, class Y>
void Matrix::product(const Kernels& kernels, const X& x, const Y& y) const {
    const auto call = [&](auto dense_x, auto event_x, const auto& packed) {
        if constexpr (std::is_same_v<X, Events>)
            event_x(packed, x, y);
        else if constexpr (std::is_same_v<X, Batch>)
            in_pieces(packed, [&](const auto& piece, uint32_t column, uint32_t row) {
                for (size_t s = 0; s < x.n; ++s) dense_x(piece, x.x[s] + column, y[s] + row);
            });
        else
            dense_x(packed, x, y);
    };
    const uint16_t* const index16 = index32_.size() ? nullptr : index16_.data();
    const auto by_format = [&](const auto* values, auto dense, auto events_dense, auto rows, auto block,
                               auto events_block, auto complementary, auto events_complementary) {
        using Value = std::remove_cv_t<std::remove_pointer_t<decltype(values)>>;
        switch (format_) {
            case MatrixView::Format::dense:
                return call(dense, events_dense, Dense<Value>{values, padded_rows(), cols_});
            case MatrixView::Format::block:
                if constexpr (!std::is_same_v<X, Events>)
                    if (by_rows_)
                        return call(
                            rows, rows,
                            Rows<Value>{values, index16, index32_.data(), start_.data(),
                                        tail_.size() ? tail_.data() : nullptr, scale_.size() ? scale_.data() : nullptr,
                                        height_, padded_rows() / height_});
                return call(block, events_block,
                            Block<Value>{values, index16, index32_.data(), length_.size() ? length_.data() : nullptr,
                                         start_.data(), height_, cols_});
            case MatrixView::Format::complementary:
                return call(complementary, events_complementary,
                            Complementary<Value>{values, live_.data(), gates_, rows_ / gates_, cols_, sets_, overlay_});
        }
    };
#define SPARSEFOLD_SLOTS(dtype)                                                                                  \
    kernels.matvec_dense_##dtype, kernels.matvec_events_dense_##dtype, kernels.matvec_rows_##dtype,              \
        kernels.matvec_block_##dtype, kernels.matvec_events_block_##dtype, kernels.matvec_complementary_##dtype, \
        kernels.matvec_events_complementary_##dtype
    switch (precision_) {
        case MatrixView::Precision::f32:
            return by_format(values_.data(), SPARSEFOLD_SLOTS(f32));
        case MatrixView::Precision::bf16:
            return by_format(halves_.data(), SPARSEFOLD_SLOTS(bf16));
        case MatrixView::Precision::i8:
            return by_format(codes_.data(), SPARSEFOLD_SLOTS(i8));
        case MatrixView::Precision::w8a8:
            break;  // reads codes only
    }
#undef SPARSEFOLD_SLOTS
}

RowsOfCodes Matrix::rows_of_codes() const {
    return {codes_.data(),
            index16_.size() ? index16_.data() : nullptr,
            index32_.size() ? index32_.data() : nullptr,
            start_.data(),
            scale_.data(),
            marks_.size() ? marks_.data() : nullptr,
            added_.data(),
            ceil_div(cols_, 64),
            height_,
            padded_rows() / height_};
}

void Matrix::begin(const float* bias, float* y) const {
    if (bias && !scaled_behind())
        std::memcpy(y, bias, padded_rows() * sizeof(float));
    else
        std::memset(y, 0, padded_rows() * sizeof(float));
}

void Matrix::end(const Kernels& kernels, const float* bias, float* y) const {
    if (scaled_behind()) kernels.scale(y, scale_.data(), bias, padded_rows());
}

void Matrix::matvec(const Kernels& kernels, const float* x, const float* bias, float* y, int8_t* codes) const {
    begin(bias, y);
    if (precision_ != MatrixView::Precision::w8a8) {
        product(kernels, x, y);
        return end(kernels, bias, y);
    }
    const float x_scale = kernels.codes_of(x, codes, cols_);
    kernels.matvec_rows_w8a8(rows_of_codes(), codes, x_scale, y);
}

void Matrix::matvec(const Kernels& kernels, const Events& x, const float* bias, float* y) const {
    begin(bias, y);
    product(kernels, x, y);
    end(kernels, bias, y);
}

void Matrix::accumulate(const Kernels& kernels, const Events& x, float* y, float* room) const {
    if (x.count == 0) return;
    std::memset(room, 0, padded_rows() * sizeof(float));
    product(kernels, x, room);
    kernels.add_scaled(y, room, scaled_behind() ? scale_.data() : nullptr, padded_rows());
}

void Matrix::matvec_batch(const Kernels& kernels, size_t n, const float* const* x, const float* bias, float* const* y,
                          int8_t* const* codes) const {
    for (size_t s = 0; s < n; ++s) begin(bias, y[s]);
    if (precision_ != MatrixView::Precision::w8a8) {
        product(kernels, Batch{n, x}, y);
        for (size_t s = 0; s < n; ++s) end(kernels, bias, y[s]);
        return;
    }
    float scales[kBatch];
    for (size_t s = 0; s < n; ++s) scales[s] = kernels.codes_of(x[s], codes[s], cols_);
    in_pieces(rows_of_codes(), [&](const RowsOfCodes& piece, uint32_t, uint32_t row) {
        for (size_t s = 0; s < n; ++s) kernels.matvec_rows_w8a8(piece, codes[s], scales[s], y[s] + row);
    });
}

size_t Matrix::nbytes() const {
    return (values_.size() + scale_.size()) * sizeof(float) + halves_.size() * sizeof(bf16) + codes_.size() +
           (index32_.size() + length_.size() + start_.size()) * sizeof(uint32_t) +
           (index16_.size() + tail_.size()) * sizeof(uint16_t) + live_.size() + marks_.size() * sizeof(uint64_t) +
           added_.size() * sizeof(int32_t);
}

Op Program::make(Op::Kind kind, uint32_t inputs, uint32_t outputs, bool reverse) const {
    if (inputs == 0 || outputs == 0) refuse("every op needs at least one input and one output.");
    if (reverse && (ops_.empty() || ops_.back().kind != kind || ops_.back().reverse || ops_.back().inputs != inputs ||
                    ops_.back().outputs != outputs))
        refuse("an op that reads backwards follows one of its kind and sizes that reads forwards.");
    if (!ops_.empty() && !reverse) {
        if (kind == Op::Kind::embedding) refuse("an embedding can only be the first op.");
        if (this->outputs() != inputs)
            refuse("op " + number(ops_.size()) + " reads " + number(inputs) + " values, but the op before it gives " +
                   number(this->outputs()) + ".");
    }
    Op op;
    op.kind = kind;
    op.inputs = inputs;
    op.outputs = outputs;
    const bool pointwise = op.weightless() || kind == Op::Kind::layer_norm;  // no columns to leave out
    op.reads_events = reverse ? ops_.back().reads_events : !pointwise && !ops_.empty() && ops_.back().emits_events;
    op.reverse = reverse;
    return op;
}

void Program::add_embedding(const float* weight, uint32_t tokens, uint32_t width) {
    Op op = make(Op::Kind::embedding, tokens, width);
    op.table = Buffer<float>(size_t{tokens} * pad(width));
    for (uint32_t t = 0; t < tokens; ++t)
        std::memcpy(op.table.data() + size_t{t} * pad(width), weight + size_t{t} * width, width * sizeof(float));
    ops_.push_back(std::move(op));
}

void Program::add_linear(const MatrixView& weight, const float* bias) {
    Op op = make(Op::Kind::linear, weight.cols, weight.rows);
    if (weight.gates != 1) refuse("a linear op has one gate.");
    op.input = Matrix(weight, op.reads());
    op.bias_input = padded(bias, 1, weight.rows);
    ops_.push_back(std::move(op));
}

void Program::add_conv1d(const MatrixView& weight, const float* bias, uint32_t kernel, uint32_t dilation,
                         uint32_t groups) {
    if (weight.gates != 1) refuse("a convolution has one gate.");
    if (kernel == 0 || dilation == 0 || groups == 0) refuse("kernel, dilation and groups are at least 1.");
    if (weight.cols % kernel)
        refuse(number(weight.cols) + " columns cannot hold " + number(kernel) + " taps of equal width.");
    const uint32_t inputs = weight.cols / kernel;
    if (inputs % groups || weight.rows % groups)
        refuse(number(inputs) + " inputs and " + number(weight.rows) + " outputs cannot form " + number(groups) +
               " groups of equal size.");
    uint64_t remembered = uint64_t{kernel - 1} * inputs * dilation;  // each below 2^28, and kernel * inputs as well
    for (const Op& op : ops_)
        if (op.kind == Op::Kind::conv1d) remembered += uint64_t{op.history()} * op.inputs;
    if (remembered > kHistory)
        refuse("convolutions remember at most " + number(kHistory) + " values, these " + number(remembered) + ".");
    Op op = make(Op::Kind::conv1d, inputs, weight.rows);
    op.input = Matrix(weight, op.reads());  // checks every index
    if (groups > 1)
        each_element(weight, [&](uint64_t row, uint64_t column, float value) {
            if (value != 0 && row / (weight.rows / groups) != column % inputs / (inputs / groups))
                refuse("a weight joins an input and an output of two of its " + number(groups) + " groups.");
        });
    op.bias_input = padded(bias, 1, weight.rows);
    op.kernel = kernel;
    op.dilation = kernel > 1 ? dilation : 1;
    ops_.push_back(std::move(op));
}

Op Program::make_recurrent(Op::Kind kind, uint32_t gates, const MatrixView& weight_ih, const MatrixView& weight_hh,
                           const float* bias_ih, const float* bias_hh, bool reset_after, Deltas delta,
                           bool reverse) const {
    const uint32_t units = weight_hh.cols;
    for (const float threshold : {delta.input, delta.hidden})
        if (threshold != -1 && !(threshold >= 0 && threshold <= 1e30f))
            refuse("the threshold of a change must be in [0, 1e30].");
    if (delta.hidden >= 0 && !reset_after)
        refuse(
            "delta_hidden needs reset_after=True; otherwise n reads r * h', which changes with r while no unit does.");
    if (weight_hh.gates != gates || weight_ih.gates != gates || uint64_t{weight_hh.rows} != uint64_t{units} * gates ||
        weight_ih.rows != weight_hh.rows)
        refuse("a recurrent op of " + number(units) + " units has " + number(gates) +
               " gates of as many rows; its matrices have " + number(weight_ih.rows) + " and " +
               number(weight_hh.rows) + " rows in " + number(weight_ih.gates) + " and " + number(weight_hh.gates) +
               " gates.");
    Op op = make(kind, weight_ih.cols, units, reverse);
    op.gates = gates;
    op.delta = delta;
    if (delta.input >= 0) op.reads_events = false;  // changes of the values themselves, whoever else hears of them
    op.input = Matrix(weight_ih, op.reads());
    const Matrix::Reads spoken =
        kind == Op::Kind::egru || delta.hidden >= 0 ? Matrix::Reads::events : Matrix::Reads::dense;
    op.hidden = Matrix(weight_hh, spoken, 0, reset_after ? gates : 2);
    if (!reset_after) op.hidden_n = Matrix(weight_hh, spoken, 2, 3);
    op.bias_input = padded(bias_ih, gates, units);
    op.bias_hidden = padded(bias_hh, gates, units);
    op.reset_after = reset_after;
    return op;
}

void Program::add_gru(const MatrixView& weight_ih, const MatrixView& weight_hh, const float* bias_ih,
                      const float* bias_hh, bool reset_after, Deltas delta, bool reverse) {
    ops_.push_back(
        make_recurrent(Op::Kind::gru, 3, weight_ih, weight_hh, bias_ih, bias_hh, reset_after, delta, reverse));
}

void Program::add_egru(const MatrixView& weight_ih, const MatrixView& weight_hh, const float* bias_ih,
                       const float* bias_hh, const float* threshold, bool reset_after, Reset reset, bool always,
                       bool emits_events, float zoneout, bool reverse) {
    Op op = make_recurrent(Op::Kind::egru, 3, weight_ih, weight_hh, bias_ih, bias_hh, reset_after, {}, reverse);
    if (reverse && ops_.back().emits_events != emits_events)
        refuse("both directions hand on events, or both their state.");
    op.reset = reset;
    op.zoneout = zoneout;
    op.emits_events = emits_events;
    op.threshold = padded(threshold, 1, op.outputs);
    op.crossing = padded(threshold, 1, op.outputs);
    if (always)
        for (uint32_t j = 0; j < op.outputs; ++j) op.crossing[j] = -std::numeric_limits<float>::infinity();
    ops_.push_back(std::move(op));
}

void Program::add_lstm(const MatrixView& weight_ih, const MatrixView& weight_hh, const float* bias_ih,
                       const float* bias_hh, Deltas delta, bool reverse) {
    ops_.push_back(make_recurrent(Op::Kind::lstm, 4, weight_ih, weight_hh, bias_ih, bias_hh, true, delta, reverse));
}

void Program::add_rnn(const MatrixView& weight_ih, const MatrixView& weight_hh, const float* bias_ih,
                      const float* bias_hh, bool relu, Deltas delta, bool reverse) {
    Op op = make_recurrent(Op::Kind::rnn, 1, weight_ih, weight_hh, bias_ih, bias_hh, true, delta, reverse);
    op.relu = relu;
    ops_.push_back(std::move(op));
}

void Program::add_weightless(Op::Kind kind, uint32_t units, uint32_t k, uint32_t groups) {
    const bool first = ops_.empty();
    if (first && kind != Op::Kind::events) refuse("an op without weights cannot be the first, unless it is events.");
    // They carry no array, so that a chain of them would cost a stream memory that no file had to pay for.
    if (!first && kind == Op::Kind::relu && ops_.back().kind == kind)
        refuse("a relu after a relu changes nothing; leave it out.");
    if (!first && kind == Op::Kind::events && ops_.back().emits_events)
        refuse("events of what already is an event list change nothing; leave it out.");
    if (ops_.size() >= 2 && ops_[ops_.size() - 1].weightless() && ops_[ops_.size() - 2].weightless())
        refuse("at most two ops without weights follow one another.");
    if (kind == Op::Kind::relu) units = outputs();
    if ((kind == Op::Kind::kwta || kind == Op::Kind::top_k) &&
        (groups == 0 || k == 0 || units % groups || k > units / groups))
        refuse("of " + number(units) + " values in " + number(groups) + " equal parts, " + number(k) +
               " of each cannot be kept.");
    if (kind == Op::Kind::top_k && units > 1u << 24)
        refuse("the index of one of " + number(units) + " values is not exact as a float32; 2^24 are.");
    Op op = make(kind, units, kind == Op::Kind::top_k ? 2 * k : units);
    op.emits_events = op.picks();
    op.k = k;
    op.groups = groups;
    ops_.push_back(std::move(op));
}

bool Program::whole_sequences() const {
    return std::any_of(ops_.begin(), ops_.end(), [](const Op& op) { return op.reverse; });
}

void Program::complete() const {
    for (const Op& op : ops_)
        if (!op.weightless()) return;
    refuse("a program needs an op with weights.");
}

size_t Program::before_clusters(size_t end) const {
    while (end && ops_[end - 1].kind == Op::Kind::cluster) --end;
    return end;
}

bool Program::scores() const {
    const Op::Kind last = ops_.back().kind;
    return last == Op::Kind::linear || last == Op::Kind::log_softmax || last == Op::Kind::cluster;
}

void Program::add_cluster(const MatrixView& projection, const MatrixView& weight, const float* bias, uint32_t units,
                          uint32_t at) {
    const size_t head = before_clusters(ops_.size());  // one behind the log-softmax
    if (head < 2 || ops_[head - 1].kind != Op::Kind::log_softmax || ops_[head - 2].kind != Op::Kind::linear)
        refuse("a cluster stands behind a linear and a log_softmax, or behind another cluster of theirs.");
    if (projection.gates != 1 || weight.gates != 1) refuse("the matrices of a cluster have one gate each.");
    const Op &linear = ops_[head - 2], &before = ops_.back();
    if (projection.cols != linear.inputs)
        refuse("the projection of a cluster reads what the linear op reads, " + number(linear.inputs) +
               " values; it has " + number(projection.cols) + " columns.");
    if (projection.rows == 0 || weight.rows == 0)
        refuse("a cluster holds at least one word, and its projection gives at least one number.");
    if (weight.cols != projection.rows)
        refuse("the weight of a cluster has a column for each of the " + number(projection.rows) +
               " rows of its projection; it has " + number(weight.cols) + ".");
    if (at == 0 || at >= units)
        refuse("a cluster stands at one of the values 1 to " + number(uint64_t{units} - 1) + ", got " + number(at) +
               ".");
    if (before.kind == Op::Kind::cluster && at < before.at + before.words())
        refuse("clusters stand in rising order: the one before ends at " + number(before.at + before.words()) +
               ", this one is at " + number(at) + ".");
    const uint64_t outputs = uint64_t{units} - 1 + weight.rows;
    if (outputs >= kOutputs) refuse("a cluster gives fewer than 2^28 values, this one " + number(outputs) + ".");
    Op op = make(Op::Kind::cluster, units, static_cast<uint32_t>(outputs));
    op.reads_events = linear.reads_events;
    op.input = Matrix(projection, op.reads());
    op.hidden = Matrix(weight, Matrix::Reads::dense);
    op.bias_hidden = padded(bias, 1, weight.rows);
    op.at = at;
    ops_.push_back(std::move(op));
}

void Program::add_layer_norm(const float* weight, const float* bias, uint32_t units, float epsilon) {
    Op op = make(Op::Kind::layer_norm, units, units);
    op.scale = padded(weight, 1, units);
    op.bias_input = padded(bias, 1, units);
    op.epsilon = epsilon;
    ops_.push_back(std::move(op));
}

void Program::fold(const Kernels& kernels, uint64_t limit) {
    if (ops_.size() < 2 || !takes_tokens() || !ops_[1].recurrent()) return;
    if (ops_.size() > 2 && ops_[2].reverse) return;  // it reads the embedding as well
    Op &embedding = ops_[0], &layer = ops_[1];
    if (layer.delta.input >= 0) return;  // its product is not one of the token alone
    const size_t stride = size_t{layer.gates} * pad(layer.outputs);
    if (uint64_t{embedding.inputs} * stride * sizeof(float) > limit) return;
    layer.table = Buffer<float>(embedding.inputs * stride);
    std::vector<int8_t> codes(layer.input.code_bytes());
    for (uint32_t t = 0; t < embedding.inputs; ++t) {
        float* row = layer.table.data() + t * stride;
        layer.input.matvec(kernels, embedding.table.data() + size_t{t} * pad(embedding.outputs),
                           layer.bias_input.data(), row, codes.data());
    }
    layer.input = Matrix();
    embedding.table = Buffer<float>();
    embedding.folded = true;
}

size_t Program::nbytes() const {
    size_t total = 0;
    for (const Op& op : ops_)
        total += op.input.nbytes() + op.hidden.nbytes() + op.hidden_n.nbytes() +
                 (op.table.size() + op.bias_input.size() + op.bias_hidden.size() + op.threshold.size() +
                  op.scale.size() + op.crossing.size()) *
                     sizeof(float);
    return total;
}

}  // namespace sparsefold
