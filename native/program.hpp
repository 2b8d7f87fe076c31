// A network as the engine plays it: weights packed for the kernels, every index of the unpacked form checked on the
// way.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "kernels.hpp"

namespace sparsefold {

/// Zeroed memory on a cache-line boundary.
template <class T>
class Buffer {
  public:
    Buffer() = default;
    explicit Buffer(size_t size) : size_(size) {
        // Large arrays ask for large pages: a product that jumps from column to column would miss the TLB at each.
        const size_t line = size * sizeof(T) >= kLargePage ? kLargePage : 64;
        if (size > SIZE_MAX / sizeof(T) - kLargePage) throw std::bad_alloc();
        const size_t bytes = (size * sizeof(T) + line - 1) / line * line;
        data_.reset(static_cast<T*>(std::aligned_alloc(line, bytes ? bytes : 64)));
        if (!data_) throw std::bad_alloc();
#if defined(__linux__)
        if (line == kLargePage)
            madvise(data_.get(), bytes, MADV_HUGEPAGE);  // a wish: whether it is granted is no matter
#endif
        std::memset(static_cast<void*>(data_.get()), 0, bytes);
    }
    T* data() { return data_.get(); }
    const T* data() const { return data_.get(); }
    size_t size() const { return size_; }
    T& operator[](size_t i) { return data_.get()[i]; }
    const T& operator[](size_t i) const { return data_.get()[i]; }

  private:
    static constexpr size_t kLargePage = size_t{2} << 20;
    struct Free {
        void operator()(T* p) const { std::free(p); }
    };
    std::unique_ptr<T, Free> data_;
    size_t size_ = 0;
};

constexpr size_t kBatch = 16;             // streams that play together
constexpr uint32_t kDeltaRefresh = 1024;  // steps after which the memories of changes are summed anew
constexpr uint64_t kHistory = 1u << 22;   // values that all convolutions of a program remember
constexpr uint64_t kOutputs = 1u << 28;   // of an op, fewer than that

/// A weight matrix as a file holds it; pointers are borrowed.
struct MatrixView {
    enum class Format { dense, block, complementary } format = Format::dense;
    uint32_t rows = 0, cols = 0, gates = 1;
    const float* values =
        nullptr;  // dense (rows, cols); block (blocks, block_cols, block_rows); complementary (cols, gates, sets)
    uint32_t block_rows = 1, block_cols = 1;
    const uint32_t* block_row = nullptr;  // (blocks) counted over gates * ceil(rows / gates / block_rows)
    const uint32_t* start = nullptr;      // (ceil(cols / block_cols) + 1)
    uint64_t blocks = 0;
    uint32_t overlay = 0;  // complementary, groups of one row: sets = ceil(rows / gates / overlay)
    // `values` are always floats; where they are codes times a scale, or halves, they are packed as what they came
    // from.
    // w8a8: int8 weights, and a dense x is rounded to int8 codes as well.
    enum class Precision { f32, bf16, i8, w8a8 } precision = Precision::f32;
    bool coded = false;            // `values` are the codes themselves
    const float* scale = nullptr;  // int8: (rows), positive
    bool int8() const { return precision == Precision::i8 || precision == Precision::w8a8; }
    const uint8_t* live = nullptr;  // (cols, gates, sets) which of `overlay` rows each set keeps
};

/// A packed matrix: gate g's rows lie at g * pad(rows / gates) of the product.
class Matrix {
  public:
    enum class Reads { dense, events };  // what its product reads decides how blocks are packed
    Matrix() = default;
    /// Packs gates [first_gate, last_gate) of `view`. Throws std::invalid_argument on any index out of range.
    Matrix(const MatrixView& view, Reads reads, uint32_t first_gate, uint32_t last_gate);
    Matrix(const MatrixView& view, Reads reads) : Matrix(view, reads, 0, view.gates) {}

    /// y = W x + bias, both with gates padded, no bias where it is null; x is what the matrix was packed for. `codes`
    /// is room for `code_bytes()`.
    void matvec(const Kernels& kernels, const float* x, const float* bias, float* y, int8_t* codes) const;
    void matvec(const Kernels& kernels, const Events& x, const float* bias, float* y) const;
    /// y += W x of a y that is never cleared: what x gives is summed in `room`, for `padded_rows()`, and rounds at the
    /// size of y but once.
    void accumulate(const Kernels& kernels, const Events& x, float* y, float* room) const;
    /// `matvec` for `n` dense x at once, at most kBatch: the weights are read in pieces that stay in the nearest cache
    /// for all of them. Every sum keeps its order.
    void matvec_batch(const Kernels& kernels, size_t n, const float* const* x, const float* bias, float* const* y,
                      int8_t* const* codes) const;
    uint32_t rows() const { return rows_; }  // without padding
    uint32_t cols() const { return cols_; }
    size_t code_bytes() const { return precision_ == MatrixView::Precision::w8a8 ? size_t{cols_} + 64 : 0; }
    uint32_t gates() const { return gates_; }
    size_t elements() const { return values_.size() + halves_.size() + codes_.size(); }  // stored, with what is padded
    uint32_t padded_rows() const { return gates_ ? gates_ * pad(rows_ / gates_) : 0; }
    size_t nbytes() const;

  private:
    void pack_dense(const MatrixView& view, uint32_t first_gate);
    void pack_block(const MatrixView& view, uint32_t first_gate, Reads reads);
    template <class Segments>
    void pack_columns(const MatrixView& view, const Segments& segments, size_t count);
    template <class Segments>
    void pack_rows(const MatrixView& view, const Segments& segments);
    void pack_complementary(const MatrixView& view, uint32_t first_gate);
    void narrow(const MatrixView& view, uint32_t first_gate);
    template <class X, class Y>
    void product(const Kernels& kernels, const X& x, const Y& y) const;
    /// Sums are of int8 codes, and their rows' scales are multiplied to them behind the product.
    bool scaled_behind() const { return precision_ == MatrixView::Precision::i8 && !by_rows_; }
    void begin(const float* bias, float* y) const;
    void end(const Kernels& kernels, const float* bias, float* y) const;
    RowsOfCodes rows_of_codes() const;
    bool by_rows_ = false;  // packed as `Rows` or `RowsOfCodes`
    MatrixView::Format format_ = MatrixView::Format::dense;
    uint32_t rows_ = 0, cols_ = 0, gates_ = 0;
    MatrixView::Precision precision_ = MatrixView::Precision::f32;
    Buffer<float> values_;  // one of these three
    Buffer<bf16> halves_;
    Buffer<int8_t> codes_;
    Buffer<float> scale_;       // int8: by padded row
    Buffer<uint16_t> index16_;  // rows of segments, or columns of strips
    Buffer<uint32_t> index32_, length_, start_;
    Buffer<uint16_t> tail_;
    Buffer<uint64_t> marks_;  // w8a8 in strips of sixteen rows: the columns of a strip as bits
    Buffer<int32_t> added_;
    Buffer<uint8_t> live_;
    uint32_t height_ = kLanes, sets_ = 0, overlay_ = 0;
};

/// Thresholds of what a delta network sends; below 0, a product reads all of its values.
struct Deltas {
    float input = -1, hidden = -1;
};

struct Op {
    enum class Kind {
        embedding,
        linear,
        conv1d,
        gru,
        egru,
        lstm,
        rnn,
        relu,
        events,
        kwta,
        layer_norm,
        log_softmax,
        cluster,
        top_k
    };
    Kind kind = Kind::linear;
    uint32_t inputs = 0, outputs = 0;  // an embedding's inputs are its tokens
    uint32_t gates = 0;                // of a recurrent op
    bool reads_events = false;         // its input is the event list of the op before
    Buffer<float> table;               // embedding rows, or the folded input product of every token
    bool folded = false;               // embedding: skipped, the next op holds the table
    Matrix input, hidden, hidden_n;    // hidden_n only when !reset_after: the rows of n, apart from those of r and z;
                                       // of a cluster its projection, and in `hidden` the weight behind it
    Buffer<float> bias_input, bias_hidden;
    Deltas delta;
    bool reverse = false;  // of a recurrent op: reads what the op before it reads, backwards; both outputs go on
    bool reset_after = true;
    bool relu = false;    // RNN only
    Buffer<float> scale;  // layer norm only, and its bias is bias_input
    float epsilon = 0;
    uint32_t k = 0, groups = 1;  // KWTA; k of a top-k too
    uint32_t kernel = 1,
             dilation = 1;  // convolution only; its input matrix has kernel * inputs columns, the newest last
    uint32_t at = 0;        // cluster only: which of the values it reads is the cluster
    // EGRU only
    Reset reset = Reset::threshold;
    float zoneout = 0;
    bool emits_events = false;  // hands on y as events; else u, dense. Always true of a ReLU
    Buffer<float> threshold, crossing;

    Matrix::Reads reads() const {
        return reads_events || delta.input >= 0 ? Matrix::Reads::events : Matrix::Reads::dense;
    }
    bool sends_changes() const { return delta.input >= 0 || delta.hidden >= 0; }
    bool recurrent() const { return gates != 0; }
    uint32_t words() const { return hidden.rows(); }              // of a cluster
    uint32_t history() const { return (kernel - 1) * dilation; }  // inputs that are carried from step to step
    bool picks() const {
        return kind == Kind::relu || kind == Kind::events || kind == Kind::kwta;
    }  // which values speak
    bool speaks() const { return kind == Kind::egru || picks(); }  // makes an event list at every step
    bool weightless() const { return picks() || kind == Kind::log_softmax || kind == Kind::top_k; }
};

class Program {
  public:
    void add_embedding(const float* weight, uint32_t tokens, uint32_t width);
    void add_linear(const MatrixView& weight, const float* bias);
    void add_conv1d(const MatrixView& weight, const float* bias, uint32_t kernel, uint32_t dilation, uint32_t groups);
    // `reverse`: of the kind and the sizes of the op before it, which plays forwards.
    void add_gru(const MatrixView& weight_ih, const MatrixView& weight_hh, const float* bias_ih, const float* bias_hh,
                 bool reset_after, Deltas delta = {}, bool reverse = false);
    void add_egru(const MatrixView& weight_ih, const MatrixView& weight_hh, const float* bias_ih, const float* bias_hh,
                  const float* threshold, bool reset_after, Reset reset, bool always, bool emits_events, float zoneout,
                  bool reverse = false);
    void add_lstm(const MatrixView& weight_ih, const MatrixView& weight_hh, const float* bias_ih, const float* bias_hh,
                  Deltas delta = {}, bool reverse = false);
    void add_rnn(const MatrixView& weight_ih, const MatrixView& weight_hh, const float* bias_ih, const float* bias_hh,
                 bool relu, Deltas delta = {}, bool reverse = false);
    // Of all that the op before gives; events may be the first op.
    void add_relu() { add_weightless(Op::Kind::relu, 0); }
    void add_events(uint32_t units) { add_weightless(Op::Kind::events, units); }
    void add_kwta(uint32_t units, uint32_t k, uint32_t groups) { add_weightless(Op::Kind::kwta, units, k, groups); }
    void add_log_softmax(uint32_t units) { add_weightless(Op::Kind::log_softmax, units); }
    void add_top_k(uint32_t units, uint32_t k) { add_weightless(Op::Kind::top_k, units, k); }
    /// Behind a log-softmax of a linear op, whose x the projection reads, or behind another cluster of lower places.
    void add_cluster(const MatrixView& projection, const MatrixView& weight, const float* bias, uint32_t units,
                     uint32_t at);
    void add_layer_norm(const float* weight, const float* bias, uint32_t units, float epsilon);
    /// Replaces embedding and input product by one table where it takes at most `limit` bytes. The product is made by
    /// the same kernel, so that folding changes no bit of any output.
    void fold(const Kernels& kernels, uint64_t limit);

    const std::vector<Op>& ops() const { return ops_; }
    /// Throws unless some op has weights: the others ask for memory that no file paid for.
    void complete() const;
    uint32_t inputs() const { return ops_.front().inputs; }
    uint32_t outputs() const { return ops_.back().outputs * (ops_.back().reverse ? 2 : 1); }
    /// Whether an op reads backwards: only `Stream::run` plays such a program, and each run starts from zero.
    bool whole_sequences() const;
    bool takes_tokens() const { return ops_.front().kind == Op::Kind::embedding; }
    /// Whether the last op gives a logit or a log-probability for each output, so that `Stream::score` plays it.
    bool scores() const;
    /// How many of the first `end` ops are not clusters at their end.
    size_t before_clusters(size_t end) const;
    size_t nbytes() const;

  private:
    void add_weightless(Op::Kind kind, uint32_t units, uint32_t k = 0, uint32_t groups = 1);
    Op make(Op::Kind kind, uint32_t inputs, uint32_t outputs, bool reverse = false) const;
    Op make_recurrent(Op::Kind kind, uint32_t gates, const MatrixView& weight_ih, const MatrixView& weight_hh,
                      const float* bias_ih, const float* bias_hh, bool reset_after, Deltas delta, bool reverse) const;
    std::vector<Op> ops_;  // an op enters when it is complete: a refused one leaves no trace
};

}  // namespace sparsefold
