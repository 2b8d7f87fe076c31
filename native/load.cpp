#include "load.hpp"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <initializer_list>
#include <limits>
#include <map>
#include <optional>
#include <string_view>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "a .sfold file is little-endian, and its arrays are read where they lie"
#endif

namespace sparsefold {

namespace {

constexpr uint64_t kMaxHeader = 16u << 20;
constexpr size_t kMaxOps = 1024, kMaxName = 200, kMaxAxes = 4;
constexpr size_t kMaxDepth = 64;     // of lists and objects: the reader recurses
constexpr size_t kMaxDigits = 4300;  // of a whole number: where Python's reader stops
constexpr uint64_t kMaxAxis = 1u << 28;
constexpr uint64_t kHeader = 8;  // where the header begins

// --- JSON -----------------------------------------------------------------------------------------------------------

/// One value inside JSON text that a Scanner has walked over. It is read by walking again, not kept as a tree: a
/// program's header is three levels deep, and sixteen hostile megabytes of it shall not become a gigabyte.
struct Json {
    std::string_view text;

    bool is(char first) const { return text.front() == first; }  // '{', '[', '"', 't', 'f', 'n'
    std::vector<std::pair<std::string, Json>> members() const;   // of an object
    std::vector<Json> items(size_t most) const;                  // of a list; one more than `most` when it has more
    std::string string() const;                                  // of a string
    std::optional<uint64_t> whole() const;                       // a number >= 0 without fraction and exponent
    std::optional<double> number() const;                        // NaN when no double is near it
};

/// Walks over JSON text. What it accepts is what Python's json.loads accepts (so also NaN and Infinity), but no key
/// twice.
class Scanner {
  public:
    /// `exact`: the text is the file's own, so that an error's place in it is one in the file.
    Scanner(std::string_view text, const char* what, uint64_t offset, bool exact)
        : at_(text.data()), begin_(at_), end_(at_ + text.size()), what_(what), offset_(offset), exact_(exact) {}
    explicit Scanner(const Json& sound) : Scanner(sound.text, "JSON", 0, false) {}

    Json document() {
        const Json all = value(1);
        if (at_ != end_) fail("something follows the value");
        return all;
    }
    /// The value here and the space around it; `depth` is that of a list or object that begins here.
    Json value(size_t depth) {
        space();
        const char* first = at_;
        if (at_ == end_) fail("a value is missing");
        switch (*at_) {
            case '{': {
                std::vector<std::string> keys;
                object(depth, [&](std::string key) {
                    keys.push_back(std::move(key));
                    value(depth + 1);
                });
                std::sort(keys.begin(), keys.end());
                if (std::adjacent_find(keys.begin(), keys.end()) != keys.end()) fail("a key occurs twice");
                break;
            }
            case '[':
                list(depth, [&] { return value(depth + 1), true; });
                break;
            case '"':
                string(nullptr);
                break;
            default:
                scalar();
        }
        const Json found{{first, static_cast<size_t>(at_ - first)}};
        space();
        return found;
    }
    template <class Visit>  // visit(key) walks over the value
    void object(size_t depth, Visit visit) {
        sequence(depth, '}', [&] {
            std::string key;
            if (at_ == end_ || *at_ != '"') fail("a key must be a string");
            string(&key);
            space();
            if (!skip(':')) fail("':' is missing");
            visit(std::move(key));
            return true;
        });
    }
    template <class Visit>  // visit() walks over an item and says whether to go on
    void list(size_t depth, Visit visit) {
        sequence(depth, ']', visit);
    }
    void string(std::string* out) {
        for (++at_;;) {
            const char* plain = at_;
            while (at_ != end_ && *at_ != '"' && *at_ != '\\' && static_cast<unsigned char>(*at_) >= 0x20) ++at_;
            if (out) out->append(plain, at_);
            if (at_ == end_) fail("a string does not end");
            if (*at_ == '"') break;
            if (*at_ != '\\') fail("a string holds a control character");
            if (++at_ == end_) fail("a string does not end");
            const char escaped = *at_++;
            if (escaped == 'u') {
                unicode(out);
                continue;
            }
            const size_t which = std::string_view("\"\\/bfnrt").find(escaped);
            if (which == std::string_view::npos) fail("a string holds an unknown escape");
            if (out) out->push_back("\"\\/\b\f\n\r\t"[which]);
        }
        ++at_;
    }

  private:
    [[noreturn]] void fail(const char* why) const {
        throw LoadError(std::string(what_) + " is not valid JSON: " + why,
                        offset_ + (exact_ ? static_cast<uint64_t>(at_ - begin_) : 0));
    }
    void space() {
        while (at_ != end_ && (*at_ == ' ' || *at_ == '\t' || *at_ == '\n' || *at_ == '\r')) ++at_;
    }
    bool skip(char c) {
        if (at_ == end_ || *at_ != c) return false;
        ++at_;
        return true;
    }
    template <class Visit>
    void sequence(size_t depth, char close, Visit visit) {
        if (depth > kMaxDepth) fail("it is nested too deeply");
        ++at_;
        space();
        if (skip(close)) return;
        do {
            space();
            if (!visit()) return;
            space();
        } while (skip(','));
        if (!skip(close)) fail("',' or the end of a list or object is missing");
    }
    bool word(std::string_view w) {
        if (static_cast<size_t>(end_ - at_) < w.size() || std::string_view(at_, w.size()) != w) return false;
        at_ += w.size();
        return true;
    }
    size_t digits() {
        const char* first = at_;
        while (at_ != end_ && *at_ >= '0' && *at_ <= '9') ++at_;
        return static_cast<size_t>(at_ - first);
    }
    void scalar() {
        for (const char* w : {"true", "false", "null", "NaN", "Infinity", "-Infinity"})
            if (word(w)) return;
        skip('-');
        const bool zero = at_ != end_ && *at_ == '0';
        size_t count = 1;
        if (zero)
            ++at_;
        else if ((count = digits()) == 0)
            fail("a value is missing");
        const char* whole = at_;
        if (skip('.') && !digits()) at_ = whole;
        const char* mantissa = at_;
        if (skip('e') || skip('E')) {
            if (!skip('+')) skip('-');
            if (!digits()) at_ = mantissa;
        }
        if (at_ == whole && count > kMaxDigits) fail("a number is too long");
    }
    uint32_t hex4() {
        uint32_t code = 0;
        if (end_ - at_ < 4) fail("a string does not end");
        for (int i = 0; i < 4; ++i) {
            const char c = *at_++;
            const int digit = c >= '0' && c <= '9'   ? c - '0'
                              : c >= 'a' && c <= 'f' ? c - 'a' + 10
                              : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                                     : -1;
            if (digit < 0) fail("a \\u is not followed by four hexadecimal digits");
            code = code << 4 | static_cast<uint32_t>(digit);
        }
        return code;
    }
    /// Behind `\u`. Half a surrogate pair is kept as three bytes: no name that we know has any.
    void unicode(std::string* out) {
        uint32_t code = hex4();
        if (code >= 0xd800 && code < 0xdc00 && word("\\u")) {
            const char* second = at_ - 2;
            const uint32_t low = hex4();
            if (low >= 0xdc00 && low < 0xe000)
                code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
            else
                at_ = second;
        }
        if (!out) return;
        const auto byte = [&](uint32_t b) { out->push_back(static_cast<char>(b)); };
        if (code < 0x80) return byte(code);
        if (code < 0x800) {
            byte(0xc0 | code >> 6);
        } else {
            if (code < 0x10000) {
                byte(0xe0 | code >> 12);
            } else {
                byte(0xf0 | code >> 18);
                byte(0x80 | (code >> 12 & 0x3f));
            }
            byte(0x80 | (code >> 6 & 0x3f));
        }
        byte(0x80 | (code & 0x3f));
    }
    const char *at_, *begin_, *end_;
    const char* what_;
    uint64_t offset_;
    bool exact_;
};

std::vector<std::pair<std::string, Json>> Json::members() const {
    std::vector<std::pair<std::string, Json>> out;
    Scanner scanner(*this);
    scanner.object(0, [&](std::string key) { out.emplace_back(std::move(key), scanner.value(0)); });
    return out;
}

std::vector<Json> Json::items(size_t most) const {
    std::vector<Json> out;
    Scanner scanner(*this);
    scanner.list(0, [&] {
        out.push_back(scanner.value(0));
        return out.size() <= most;
    });
    return out;
}

std::string Json::string() const {
    std::string out;
    Scanner(*this).string(&out);
    return out;
}

std::optional<uint64_t> Json::whole() const {
    if (text == "-0") return 0;
    uint64_t n = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), n);
    if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
    return n;
}

std::optional<double> Json::number() const {
    if (text.find_first_of("-0123456789NI") != 0) return std::nullopt;
    double value = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);  // knows no locale
    return error == std::errc() ? value : std::numeric_limits<double>::quiet_NaN();
}

/// Where `text` stops being UTF-8, or npos.
size_t not_utf8(std::string_view text) {
    const auto byte = [&](size_t i) { return i < text.size() ? static_cast<unsigned char>(text[i]) : 0u; };
    for (size_t i = 0; i < text.size();) {
        const uint32_t first = byte(i);
        const size_t more = first < 0x80 ? 0 : first >> 5 == 6 ? 1 : first >> 4 == 14 ? 2 : first >> 3 == 30 ? 3 : 4;
        if (more == 4) return i;
        uint32_t code = more ? first & (0x3fu >> more) : first;
        for (size_t k = 1; k <= more; ++k) {
            if (byte(i + k) >> 6 != 2) return i;
            code = code << 6 | (byte(i + k) & 0x3f);
        }
        constexpr uint32_t least[] = {0, 0x80, 0x800, 0x10000};
        if (code < least[more] || code > 0x10ffff || (code >= 0xd800 && code < 0xe000)) return i;
        i += 1 + more;
    }
    return std::string_view::npos;
}

// --- the file -------------------------------------------------------------------------------------------------------

enum class Type { f32, u32, u16, u8, bf16, i8 };
struct TypeInfo {
    const char* name;
    uint64_t size;
};
constexpr TypeInfo kTypes[] = {{"F32", 4}, {"U32", 4}, {"U16", 2}, {"U8", 1}, {"BF16", 2}, {"I8", 1}};
constexpr const TypeInfo& info(Type type) { return kTypes[static_cast<size_t>(type)]; }

struct Tensor {
    Type type = Type::f32;
    std::vector<uint64_t> shape;
    uint64_t first = 0, last = 0;         // bytes of the data
    const unsigned char* data = nullptr;  // once an op has taken it: aligned for its type
};

using Tensors = std::map<std::string, Tensor>;

std::string shown(const std::vector<uint64_t>& shape) {
    std::string out = "(";
    for (size_t i = 0; i < shape.size(); ++i) out += (i ? ", " : "") + std::to_string(shape[i]);
    return out + (shape.size() == 1 ? ",)" : ")");
}

/// Whole numbers below `limit`, exactly `count` of them unless that is 0; false when `list` is anything else.
bool whole_numbers(const Json* list, size_t most, uint64_t limit, std::vector<uint64_t>& out) {
    if (!list || !list->is('[')) return false;
    const std::vector<Json> items = list->items(most);
    if (items.size() > most) return false;
    for (const Json& item : items) {
        const std::optional<uint64_t> n = item.whole();
        if (!n || *n >= limit) return false;
        out.push_back(*n);
    }
    return true;
}

const Json* find(const std::vector<std::pair<std::string, Json>>& members, const char* name) {
    for (const auto& [key, value] : members)
        if (key == name) return &value;
    return nullptr;
}

Tensor read_entry(const std::string& name, const Json& entry) {
    Tensor t;
    std::vector<uint64_t> offsets;
    const auto members = entry.is('{') ? entry.members() : std::vector<std::pair<std::string, Json>>();
    const Json* dtype = find(members, "dtype");
    constexpr uint64_t limit = uint64_t{1} << 48;  // of an axis and an offset: sums and differences cannot overflow
    if (!dtype || !dtype->is('"') || !whole_numbers(find(members, "shape"), kMaxAxes, limit, t.shape) ||
        !whole_numbers(find(members, "data_offsets"), 2, limit, offsets) || offsets.size() != 2)
        throw LoadError("tensor " + name + " needs dtype, shape and data_offsets", kHeader);
    const std::string type = dtype->string();
    const auto known =
        std::find_if(std::begin(kTypes), std::end(kTypes), [&](const auto& k) { return type == k.name; });
    if (known == std::end(kTypes))
        throw LoadError("tensor " + name + " has a dtype other than F32, U32, U16, U8, BF16 and I8", kHeader);
    t.type = static_cast<Type>(known - kTypes);
    t.first = offsets[0];
    t.last = offsets[1];
    return t;
}

/// Tensors lie one after the other from the first data byte to the last.
void check_places(const Tensors& tensors, uint64_t data_start, uint64_t data_size) {
    std::vector<const Tensors::value_type*> order;
    for (const auto& each : tensors) order.push_back(&each);
    std::sort(order.begin(), order.end(), [](const auto* a, const auto* b) {
        return std::pair(a->second.first, a->second.last) < std::pair(b->second.first, b->second.last);
    });
    uint64_t end = 0;
    for (const auto* each : order) {
        const Tensor& t = each->second;
        uint64_t bytes = info(t.type).size;
        for (uint64_t n : t.shape) bytes = n && bytes > UINT64_MAX / n ? UINT64_MAX : bytes * n;
        if (std::find(t.shape.begin(), t.shape.end(), 0u) != t.shape.end()) bytes = 0;
        if (t.first != end || t.last < t.first || t.last - t.first != bytes)
            throw LoadError("tensor " + each->first + " does not follow the one before it, or its size is wrong",
                            data_start + std::min(end, data_size));
        if (t.last > data_size)
            throw LoadError("tensor " + each->first + " ends after the end of the file: it is cut off",
                            data_start + data_size);
        end = t.last;
    }
    if (end != data_size) throw LoadError("bytes follow the last tensor", data_start + end);
}

/// Adds ops to a program. Every field and every tensor is taken once; what is left over belongs to nothing.
class Builder {
  public:
    Builder(Tensors tensors, const unsigned char* data, uint64_t data_start, uint64_t ops_at)
        : tensors_(std::move(tensors)), data_(data), data_start_(data_start), ops_at_(ops_at) {}

    void add(size_t index, const Json& described) {
        fields_.clear();
        made_.clear();
        if (described.is('{'))
            for (auto& [key, value] : described.members()) fields_.emplace(std::move(key), value);
        prefix_ = std::to_string(index) + ".";
        where_ = "op " + std::to_string(index);
        const std::optional<Json> kind = field("op");
        const std::string name = kind && kind->is('"') ? kind->string() : "";
        try {
            if (name == "embedding")
                embedding();
            else if (name == "linear")
                linear();
            else if (name == "conv1d")
                conv1d();
            else if (name == "gru" || name == "egru" || name == "lstm" || name == "rnn")
                recurrent(name);
            else if (name == "relu" || name == "events" || name == "kwta" || name == "log_softmax" || name == "top_k")
                weightless(name);
            else if (name == "layer_norm")
                layer_norm();
            else if (name == "cluster")
                cluster();
            else
                refuse(
                    "is not one of embedding, linear, conv1d, gru, egru, lstm, rnn, relu, events, kwta, layer_norm, "
                    "log_softmax, cluster, top_k");
        } catch (const std::invalid_argument& error) {  // what the program itself finds wrong
            std::string why = error.what();
            if (!why.empty() && why.back() == '.') why.pop_back();
            throw LoadError(where_ + ": " + why, data_start_);
        }
        if (!fields_.empty()) refuse("has an unknown field");
    }
    Program finish() {
        if (!tensors_.empty())
            throw LoadError("tensor " + tensors_.begin()->first + " belongs to no op",
                            data_start_ + tensors_.begin()->second.first);
        try {
            program_.complete();
        } catch (const std::invalid_argument& error) {
            throw LoadError(error.what(), data_start_);
        }
        return std::move(program_);
    }

  private:
    void embedding() {
        const Tensor weight = tensor("weight", Type::f32);
        if (weight.shape.size() != 2) refuse("weight has two axes, (tokens, width); got " + shown(weight.shape));
        for (uint64_t n : weight.shape)
            if (n > kMaxAxis) refuse("weight has an axis longer than 2^28");
        program_.add_embedding(array<float>(weight), static_cast<uint32_t>(weight.shape[0]),
                               static_cast<uint32_t>(weight.shape[1]));
    }
    void linear() {
        const MatrixView weight = matrix("weight");
        program_.add_linear(weight, vector("bias", weight.rows));
    }
    void conv1d() {
        const MatrixView weight = matrix("weight");
        const float* bias = vector("bias", weight.rows);
        const uint32_t kernel = whole("kernel"), dilation = whole("dilation");
        program_.add_conv1d(weight, bias, kernel, dilation, whole("groups"));
    }
    void recurrent(const std::string& kind) {
        const MatrixView ih = matrix("weight_ih"), hh = matrix("weight_hh");
        const float *bias_ih = vector("bias_ih", ih.rows), *bias_hh = vector("bias_hh", hh.rows);
        Deltas delta;
        if (kind != "egru") delta = {change("delta_input"), change("delta_hidden")};
        const bool reverse = fields_.count("reverse") && boolean("reverse");
        if (kind == "lstm") return program_.add_lstm(ih, hh, bias_ih, bias_hh, delta, reverse);
        if (kind == "rnn")
            return program_.add_rnn(ih, hh, bias_ih, bias_hh, choice("nonlinearity", {"tanh", "relu"}) == 1, delta,
                                    reverse);
        const bool reset_after = boolean("reset_after");
        if (kind == "gru") return program_.add_gru(ih, hh, bias_ih, bias_hh, reset_after, delta, reverse);
        const float* threshold = vector("threshold", hh.cols);
        for (uint32_t j = 0; j < hh.cols; ++j)
            if (!(threshold[j] >= 0)) refuse("every threshold must be a number >= 0");
        constexpr Reset resets[] = {Reset::threshold, Reset::output, Reset::none};
        const Reset reset = resets[choice("reset", {"threshold", "output", "none"})];
        const bool always = choice("event", {"threshold", "always"}) == 1;
        const bool events = choice("output", {"events", "state"}) == 0;
        const double zoneout = number("zoneout");
        if (!(zoneout >= 0 && zoneout < 1)) refuse("zoneout must be in [0, 1)");
        program_.add_egru(ih, hh, bias_ih, bias_hh, threshold, reset_after, reset, always, events,
                          static_cast<float>(zoneout), reverse);
    }
    /// The threshold of a product that reads changes; below 0 where the op has none.
    float change(const char* name) {
        if (fields_.find(name) == fields_.end()) return -1;
        const double threshold = number(name);
        if (!(threshold >= 0 && threshold <= 1e30)) refuse(std::string(name) + " must be in [0, 1e30]");
        return static_cast<float>(threshold);
    }
    uint32_t whole(const char* name) {
        const std::optional<Json> said = field(name);
        const std::optional<uint64_t> n = said ? said->whole() : std::nullopt;
        if (!n || *n == 0 || *n >= kMaxAxis) refuse(std::string(name) + " must be a whole number between 1 and 2^28");
        return static_cast<uint32_t>(*n);
    }
    void weightless(const std::string& kind) {
        const uint32_t units = whole("units");
        if (!program_.ops().empty() && program_.outputs() != units)
            refuse("reads " + std::to_string(units) + " values, but the op before it gives " +
                   std::to_string(program_.outputs()));
        if (kind == "relu") return program_.add_relu();
        if (kind == "events") return program_.add_events(units);
        if (kind == "log_softmax") return program_.add_log_softmax(units);
        const uint32_t k = whole("k");
        if (kind == "top_k") return program_.add_top_k(units, k);
        program_.add_kwta(units, k, whole("groups"));
    }
    void cluster() {
        const MatrixView projection = matrix("projection"), weight = matrix("weight");
        const float* bias = vector("bias", weight.rows);
        const uint32_t units = whole("units");
        program_.add_cluster(projection, weight, bias, units, whole("at"));
    }
    void layer_norm() {
        const Tensor weight = tensor("weight", Type::f32);
        if (weight.shape.size() != 1) refuse("weight has one axis; got " + shown(weight.shape));
        if (weight.shape[0] > kMaxAxis) refuse("weight has an axis longer than 2^28");
        const float* bias = vector("bias", weight.shape[0]);
        const double epsilon = number("epsilon");
        if (!(epsilon >= 1e-12 && epsilon <= 1)) refuse("epsilon must be in [1e-12, 1]");
        program_.add_layer_norm(array<float>(weight), bias, static_cast<uint32_t>(weight.shape[0]),
                                static_cast<float>(epsilon));
    }

    /// Shapes are checked here, so that no pointer reaches past its tensor; indices by the program when it packs them.
    MatrixView matrix(const std::string& name) {
        const std::optional<Json> layout = field(name.c_str());
        const auto members =
            layout && layout->is('{') ? layout->members() : std::vector<std::pair<std::string, Json>>();
        const Json* format = find(members, "format");
        const std::string kind = format && format->is('"') ? format->string() : "";
        const auto size = [&](const Json* json) {
            const std::optional<uint64_t> n = json ? json->whole() : std::nullopt;
            if (!n || *n == 0 || *n >= kMaxAxis)
                refuse("matrix " + name + " needs whole numbers between 1 and 2^28 for its sizes");
            return static_cast<uint32_t>(*n);
        };
        if (kind != "dense" && kind != "csc" && kind != "block" && kind != "complementary")
            refuse("matrix " + name + " is not stored as one of dense, csc, block, complementary");
        MatrixView view;
        view.rows = size(find(members, "rows"));
        view.cols = size(find(members, "cols"));
        view.gates = size(find(members, "gates"));
        precision(name, find(members, "precision"), view);
        if (view.rows % view.gates)
            refuse("matrix " + name + " of " + std::to_string(view.rows) + " rows cannot hold " +
                   std::to_string(view.gates) + " gates of equal height");
        if (kind == "dense") {
            view.values = values(name, view, {view.rows, view.cols});
        } else if (kind == "csc") {
            csc(name, view);
        } else if (kind == "block") {
            const Json* block = find(members, "block");
            const std::vector<Json> sizes = block && block->is('[') ? block->items(2) : std::vector<Json>();
            if (sizes.size() != 2) refuse("matrix " + name + " needs block = [rows, cols]");
            view.block_rows = size(&sizes[0]);
            view.block_cols = size(&sizes[1]);
            block_matrix(name, view);
        } else {
            view.overlay = size(find(members, "overlay"));
            complementary(name, view, size(find(members, "group")));
        }
        return view;
    }
    static constexpr uint32_t kMostCodes = 0x7fffffff / (127 * 127);
    /// How the values are written. The scale of int8 comes with it; the matrix itself checks that it is positive.
    void precision(const std::string& name, const Json* json, MatrixView& view) {
        if (!json) return;
        const std::string said = json->is('"') ? json->string() : "";
        if (said == "bf16")
            view.precision = MatrixView::Precision::bf16;
        else if (said == "i8")
            view.precision = MatrixView::Precision::i8;
        else if (said == "w8a8")
            view.precision = MatrixView::Precision::w8a8;
        else if (said != "f32")
            refuse("matrix " + name + ": precision must be one of f32, bf16, i8, w8a8");
        if (view.precision == MatrixView::Precision::w8a8 && view.cols > kMostCodes)
            refuse("matrix " + name + ": 32 bits hold the sums of codes of at most " + std::to_string(kMostCodes) +
                   " columns, not of " + std::to_string(view.cols) + "; its weights are i8, not w8a8");
        view.coded = true;
        if (view.int8()) view.scale = array<float>(shaped(name + ".scale", Type::f32, {view.rows}));
    }
    /// The values, or their codes as floats.
    const float* values(const std::string& name, const MatrixView& view, const std::vector<uint64_t>& shape) {
        if (view.precision == MatrixView::Precision::f32)
            return array<float>(shaped(name + ".values", Type::f32, shape));
        const bool i8 = view.int8();
        const Tensor codes = shaped(name + ".values", i8 ? Type::i8 : Type::bf16, shape);
        const uint64_t count = (codes.last - codes.first) / info(codes.type).size;
        float* const wide = make<float>(count);
        for (uint64_t k = 0; k < count; ++k) {
            if (i8) {
                wide[k] = array<int8_t>(codes)[k];
            } else {
                const uint32_t bits = static_cast<uint32_t>(array<uint16_t>(codes)[k]) << 16;
                std::memcpy(&wide[k], &bits, sizeof bits);
            }
            if (!std::isfinite(wide[k]) || (i8 && wide[k] < -127))
                throw LoadError(
                    "tensor " + prefix_ + name + (i8 ? ".values holds the code -128" : ".values is not finite"),
                    data_start_ + codes.first + k * info(codes.type).size);
        }
        return wide;
    }
    void block_matrix(const std::string& name, MatrixView& view) {
        view.format = MatrixView::Format::block;
        const Tensor block_row = tensor(name + ".block_row", Type::u32);
        if (block_row.shape.size() != 1) refuse("matrix " + name + ": block_row has one axis");
        view.blocks = block_row.shape[0];
        view.block_row = array<uint32_t>(block_row);
        view.values = values(name, view, {view.blocks, view.block_cols, view.block_rows});
        const uint64_t columns = (uint64_t{view.cols} + view.block_cols - 1) / view.block_cols;
        view.start = array<uint32_t>(shaped(name + ".start", Type::u32, {columns + 1}));
    }
    /// Single elements are blocks of one; a row counted over all gates is a block row.
    void csc(const std::string& name, MatrixView& view) {
        view.format = MatrixView::Format::block;
        if (view.rows > 1u << 16)
            refuse("matrix " + name + ": a CSC matrix has at most 65536 rows, got " + std::to_string(view.rows));
        const Tensor row = tensor(name + ".row", Type::u16);
        if (row.shape.size() != 1) refuse("matrix " + name + ": row has one axis");
        view.blocks = row.shape[0];
        view.values = values(name, view, {view.blocks});
        view.start = array<uint32_t>(shaped(name + ".start", Type::u32, {uint64_t{view.cols} + 1}));
        uint32_t* const wide = make<uint32_t>(view.blocks);
        std::copy_n(array<uint16_t>(row), view.blocks, wide);
        view.block_row = wide;
    }
    void complementary(const std::string& name, MatrixView& view, uint32_t group) {
        for (const auto& [what, n] : {std::pair("overlay", view.overlay), std::pair("group", group)})
            if (n > 64) refuse("matrix " + name + ": " + what + " must lie between 1 and 64, got " + std::to_string(n));
        const uint32_t units = view.rows / view.gates, height = view.overlay * group;
        const uint32_t sets = units / height + (units % height != 0);
        const Tensor live = shaped(name + ".live", Type::u8, {view.cols, view.gates, sets});
        view.format = MatrixView::Format::complementary;
        view.live = array<uint8_t>(live);
        view.values = values(name, view, {view.cols, view.gates, sets, group});
        const uint64_t groups = live.last - live.first;
        for (uint64_t k = 0; k < groups; ++k) {
            if (view.live[k] >= view.overlay)
                throw LoadError(where_ + ": matrix " + name + ": group " + std::to_string(view.live[k]) +
                                    " is out of range; a set has " + std::to_string(view.overlay) + " groups",
                                data_start_ + live.first + k);
            const uint64_t first = (uint64_t{view.live[k]} * sets + k % sets) * group;
            for (uint64_t j = first < units ? units - first : 0; j < group; ++j)
                if (view.values[k * group + j] != 0)
                    throw LoadError(where_ + ": matrix " + name + ": rows beyond the end of a gate must be zero",
                                    data_start_ + live.first + k);
        }
        if (group > 1) to_block(view, group, sets, groups);
    }
    /// A live group of several rows is a block of one column; groups beyond the end of a gate are left out.
    void to_block(MatrixView& view, uint32_t group, uint32_t sets, uint64_t groups) {
        if (groups > std::numeric_limits<uint32_t>::max()) refuse("has a matrix of more than 2^32 groups");
        const uint32_t units = view.rows / view.gates, per_gate = units / group + (units % group != 0);
        uint32_t *const start = make<uint32_t>(uint64_t{view.cols} + 1), *const row = make<uint32_t>(groups);
        float* const values = make<float>(groups * group);
        std::vector<uint32_t> order(sets);
        uint32_t blocks = 0;
        for (uint32_t c = 0; c < view.cols; ++c) {
            for (uint32_t g = 0; g < view.gates; ++g) {
                const uint64_t at = (uint64_t{c} * view.gates + g) * sets;
                const auto within = [&](uint32_t s) { return view.live[at + s] * sets + s; };
                for (uint32_t s = 0; s < sets; ++s) order[s] = s;
                std::sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) { return within(a) < within(b); });
                for (uint32_t s : order) {
                    if (within(s) >= per_gate) break;
                    row[blocks] = g * per_gate + within(s);
                    std::copy_n(view.values + (at + s) * group, group, values + uint64_t{blocks} * group);
                    ++blocks;
                }
            }
            start[c + 1] = blocks;
        }
        view.format = MatrixView::Format::block;
        view.block_rows = group;
        view.block_cols = 1;
        view.blocks = blocks;
        view.values = values;
        view.block_row = row;
        view.start = start;
    }

    std::optional<Json> field(const char* name) {
        const auto found = fields_.find(name);
        if (found == fields_.end()) return std::nullopt;
        const Json value = found->second;
        fields_.erase(found);
        return value;
    }
    bool boolean(const char* name) {
        const std::optional<Json> value = field(name);
        if (!value || !(value->is('t') || value->is('f'))) refuse(std::string(name) + " must be true or false");
        return value->is('t');
    }
    double number(const char* name) {
        const std::optional<Json> value = field(name);
        const std::optional<double> found = value ? value->number() : std::nullopt;
        if (!found) refuse(std::string(name) + " must be a number");
        return *found;
    }
    size_t choice(const char* name, std::initializer_list<const char*> words) {
        const std::optional<Json> value = field(name);
        const std::string said = value && value->is('"') ? value->string() : "";
        const auto found = std::find(words.begin(), words.end(), said);
        std::string all;
        for (const char* word : words) all += (all.empty() ? "" : ", ") + std::string(word);
        if (found == words.end()) refuse(std::string(name) + " must be one of " + all);
        return static_cast<size_t>(found - words.begin());
    }
    Tensor tensor(const std::string& name, Type type) {
        const auto found = tensors_.find(prefix_ + name);
        if (found == tensors_.end() || found->second.type != type)
            refuse("needs a " + std::string(info(type).name) + " tensor " + prefix_ + name);
        Tensor taken = std::move(found->second);
        tensors_.erase(found);
        taken.data = data_ + taken.first;
        const uint64_t bytes = taken.last - taken.first;
        if (reinterpret_cast<uintptr_t>(taken.data) % info(type).size) {
            unsigned char* const aligned = make<unsigned char>(bytes);
            std::memcpy(aligned, taken.data, bytes);
            taken.data = aligned;
        }
        if (type != Type::f32) return taken;
        const float* const values = array<float>(taken);
        for (uint64_t k = 0; k < bytes / sizeof(float); ++k)
            if (!std::isfinite(values[k]))
                throw LoadError("every weight must be finite, but tensor " + prefix_ + name + " holds " +
                                    (std::isnan(values[k]) ? "a number that is none" : "an infinite number"),
                                data_start_ + taken.first + k * sizeof(float));
        return taken;
    }
    Tensor shaped(const std::string& name, Type type, const std::vector<uint64_t>& shape) {
        Tensor taken = tensor(name, type);
        if (taken.shape != shape)
            throw LoadError(where_ + ": " + name + " must be " + shown(shape) + ", got " + shown(taken.shape),
                            data_start_ + taken.first);
        return taken;
    }
    const float* vector(const char* name, uint64_t size) { return array<float>(shaped(name, Type::f32, {size})); }
    template <class T>
    static const T* array(const Tensor& t) {
        return reinterpret_cast<const T*>(t.data);
    }
    /// Memory until the next op.
    template <class T>
    T* make(uint64_t size) {
        if (size > SIZE_MAX / sizeof(T)) throw std::bad_alloc();
        made_.emplace_back(static_cast<size_t>(size) * sizeof(T));
        return reinterpret_cast<T*>(made_.back().data());
    }
    [[noreturn]] void refuse(const std::string& why) const { throw LoadError(where_ + " " + why, ops_at_); }

    Program program_;
    Tensors tensors_;
    const unsigned char* data_;
    uint64_t data_start_, ops_at_;
    std::map<std::string, Json> fields_;
    std::vector<Buffer<unsigned char>> made_;
    std::string prefix_, where_;
};

}  // namespace

uint32_t crc32(const void* data, size_t size) {
    static constexpr auto table = [] {
        std::array<uint32_t, 256> t{};
        for (uint32_t i = 0; i < 256; ++i) {
            t[i] = i;
            for (int k = 0; k < 8; ++k) t[i] = t[i] >> 1 ^ (t[i] & 1 ? 0xedb88320u : 0u);
        }
        return t;
    }();
    uint32_t crc = ~0u;
    const unsigned char* p = static_cast<const unsigned char*>(data);
    for (size_t i = 0; i < size; ++i) crc = table[(crc ^ p[i]) & 0xff] ^ crc >> 8;
    return ~crc;
}

Program load_program(const void* file, size_t size) {
    const unsigned char* raw = static_cast<const unsigned char*>(file);
    if (size < 8)
        throw LoadError(
            "the file has " + std::to_string(size) + " bytes; a program has at least 8. It is empty or cut off", size);
    uint64_t length = 0;
    std::memcpy(&length, raw, sizeof length);
    if (length > kMaxHeader || length > size - kHeader)
        throw LoadError("the first 8 bytes announce a header of " + std::to_string(length) + " bytes in a file of " +
                            std::to_string(size) + ": this is not a .sfold file, or it is cut off",
                        0);
    const std::string_view text(reinterpret_cast<const char*>(raw) + kHeader, length);
    const uint64_t data_start = kHeader + length, data_size = size - data_start;
    if (const size_t at = not_utf8(text); at != std::string_view::npos)
        throw LoadError("the header is not UTF-8: this is not a .sfold file", kHeader + at);
    const Json header = Scanner(text, "the header", kHeader, true).document();
    if (!header.is('{')) throw LoadError("the header is not an object", kHeader);

    Tensors tensors;
    std::map<std::string, std::string> meta;
    uint64_t meta_at = kHeader;
    for (const auto& [name, entry] : header.members()) {
        if (name == "__metadata__") {
            meta_at += static_cast<uint64_t>(entry.text.data() - text.data());
            if (!entry.is('{')) throw LoadError("__metadata__ must map names to strings", meta_at);
            for (const auto& [key, value] : entry.members()) {
                if (!value.is('"')) throw LoadError("__metadata__ must map names to strings", meta_at);
                meta.emplace(key, value.string());
            }
            continue;
        }
        constexpr const char* allowed = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.";
        if (name.empty() || name.size() > kMaxName || name.find_first_not_of(allowed) != std::string::npos)
            throw LoadError("a tensor's name is not made of letters, digits, '_' and '.'", kHeader);
        tensors.emplace(name, read_entry(name, entry));
    }
    check_places(tensors, data_start, data_size);

    if (!meta.count("sparsefold"))
        throw LoadError("this is a safetensors file, but not a sparsefold program: compile the model first", kHeader);
    if (meta["sparsefold"] != "1")
        throw LoadError(
            "the file has another format version than 1, which this sparsefold reads. Update sparsefold, or "
            "compile the model again",
            meta_at);
    char sum[9];
    std::snprintf(sum, sizeof sum, "%08x", static_cast<unsigned>(crc32(raw + data_start, data_size)));
    if (meta["crc32"] != sum)
        throw LoadError("the data does not match its checksum: the file is damaged. Copy it again", data_start);

    if (meta.count("metadata") && !Scanner(meta["metadata"], "the metadata", meta_at, false).document().is('{'))
        throw LoadError("the metadata must be an object", meta_at);
    const Json ops = Scanner(meta["ops"], "the op list", meta_at, false).document();
    const std::vector<Json> described = ops.is('[') ? ops.items(kMaxOps) : std::vector<Json>();
    if (described.empty() || described.size() > kMaxOps)
        throw LoadError("the op list must hold 1 to " + std::to_string(kMaxOps) + " ops", meta_at);

    Builder builder(std::move(tensors), raw + data_start, data_start, meta_at);
    for (size_t i = 0; i < described.size(); ++i) builder.add(i, described[i]);
    return builder.finish();
}

}  // namespace sparsefold
