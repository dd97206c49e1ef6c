// What a gather moves: rows and columns of many matrices, as one array of 32-bit words.
//
//   header | one entry per matrix | indices, runs and bits that the entries point to
//
// It is made once per plan, for every dtype and for all tensors of one layout (a parameter, its
// moments, its average), and read by the kernels of the CPU and of the GPU. Positions in it are
// numbers of words from its beginning; 0, where the header lies, means that there is nothing.
#pragma once
#include <cstdint>
#include <limits>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace vitprune {

constexpr int32_t kGatherMagic = 0x76706774;

struct GatherHeader {
  int32_t magic, num_words, num_entries;
};

// out[i, j] = source[rows[i], columns[j]], an index of -1 gives zeros
struct GatherEntry {
  int32_t source_rows, source_columns;
  int32_t rows, columns;   // of what comes out
  int32_t row_index;       // one number per row; 0: all rows in order
  int32_t column_index;    // one number per column; 0: all columns in order
  int32_t runs, num_runs;  // pairs (first source column or -1, length)
  int32_t kept_bits;       // one bit per source column where columns ascend, zeros at the end
  int32_t kept_columns;    // those before the zeros
  int32_t filled_bits;     // one bit per column where all source columns stay in order, with zeros
                           // between: the way back of kept_bits
  int32_t span;            // columns come in groups of so many neighbours, aligned on both sides
};

constexpr int32_t kMostSpan = 16;

// conversions on the way
enum class Cast : int32_t { kNone, kFloatToBFloat16, kFloatToHalf, kBFloat16ToFloat, kHalfToFloat };

struct GatherRun {
  int32_t source;  // first source column, -1 for zeros
  int32_t length;
};

inline int32_t words_of_bits(int32_t count) {
  return (count + 63) / 64 * 2;
}

// Where the parts of a table lie; everything else comes from here.
class GatherTableView {
 public:
  explicit GatherTableView(const int32_t* words) : words_(words) {}
  int32_t num_entries() const { return header().num_entries; }
  const GatherEntry& entry(int64_t i) const {
    return *reinterpret_cast<const GatherEntry*>(words_ + position(i));
  }
  // word where an entry lies
  static int32_t position(int64_t i) {
    return static_cast<int32_t>((sizeof(GatherHeader) + i * sizeof(GatherEntry)) / 4);
  }
  const int32_t* at(int32_t position) const { return position ? words_ + position : nullptr; }

  // Throws unless no entry reads or writes outside of its matrices or of the table.
  void check(int64_t num_words) const {
    const int64_t head = sizeof(GatherHeader) / 4, size = sizeof(GatherEntry) / 4;
    require(num_words >= head && header().magic == kGatherMagic &&
            header().num_words == num_words && header().num_entries >= 0 &&
            head + size * header().num_entries <= num_words);
    for (int32_t i = 0; i < num_entries(); ++i) check_entry(entry(i), num_words);
  }

 private:
  const GatherHeader& header() const { return *reinterpret_cast<const GatherHeader*>(words_); }

  static void require(bool ok) {
    if (!ok) throw std::invalid_argument("gather_all: table must be one that GatherTable made");
  }

  // the numbers of a part, checked to lie inside the table
  const int32_t* part(int32_t position, int64_t count, int64_t num_words) const {
    require(position >= 0 && count >= 0 && (!position || position + count <= num_words));
    return at(position);
  }

  void check_index(int32_t position, int32_t count, int32_t size, int64_t num_words) const {
    const int32_t* index = part(position, count, num_words);
    if (!index) return require(count == size);
    int32_t low = 0, high = -1;
    for (int32_t j = 0; j < count; ++j) {
      low = index[j] < low ? index[j] : low;
      high = index[j] > high ? index[j] : high;
    }
    require(low >= -1 && high < size);
  }

  // bits that are set; none may be at or past `count`
  static int64_t count_bits(const int32_t* bits, int32_t count) {
    int64_t set = 0;
    for (int32_t w = 0; w < words_of_bits(count); ++w) {
      const auto word = static_cast<uint32_t>(bits[w]);
      const int64_t inside = int64_t{count} - int64_t{w} * 32;
      require(inside >= 32 || (inside <= 0 ? word : word >> inside) == 0);
      set += __builtin_popcount(word);
    }
    return set;
  }

  void check_entry(const GatherEntry& e, int64_t num_words) const {
    require(e.source_rows >= 0 && e.source_columns >= 0 && e.rows >= 0 && e.columns >= 0);
    check_index(e.row_index, e.rows, e.source_rows, num_words);
    check_index(e.column_index, e.columns, e.source_columns, num_words);
    require(e.span == 1 || e.span == 2 || e.span == 4 || e.span == 8 || e.span == 16);
    const int32_t* numbers = part(e.runs, 2 * int64_t{e.num_runs}, num_words);
    require((numbers != nullptr) == (e.column_index != 0));
    int64_t total = 0;
    for (int32_t r = 0; numbers && r < e.num_runs; ++r) {
      const GatherRun run{numbers[2 * r], numbers[2 * r + 1]};
      require(run.length >= 0 && run.source >= -1);
      require(run.source < 0 || int64_t{run.source} + run.length <= e.source_columns);
      require((run.source < 0 || run.source % e.span == 0) && run.length % e.span == 0);
      require(total + run.length <= e.columns);
      // a vector of neighbours is read from the first one's index
      const int32_t* index = at(e.column_index) + total;
      for (int32_t k = 0; k < run.length; ++k) {
        require(index[k] == (run.source < 0 ? -1 : run.source + k));
      }
      total += run.length;
    }
    require(!numbers || total == e.columns);
    const int32_t* kept = part(e.kept_bits, words_of_bits(e.source_columns), num_words);
    require(!kept ||
            (count_bits(kept, e.source_columns) == e.kept_columns && e.kept_columns <= e.columns));
    const int32_t* filled = part(e.filled_bits, words_of_bits(e.columns), num_words);
    require(!filled || count_bits(filled, e.columns) == e.source_columns);
  }

  const int32_t* words_;
};

// Collects entries; indices that occur twice are stored once.
class GatherTableBuilder {
 public:
  using Index = std::vector<int32_t>;

  // nullptr stands for all rows or columns, in order
  void add(int64_t source_rows, int64_t source_columns, const Index* rows, const Index* columns) {
    constexpr int64_t most = std::numeric_limits<int32_t>::max() - 64;
    if (source_rows < 0 || source_columns < 0 || source_rows > most || source_columns > most) {
      throw std::invalid_argument("GatherTable: shape must have sizes from 0 to 2^31 - 65, got (" +
                                  std::to_string(source_rows) + ", " +
                                  std::to_string(source_columns) + ")");
    }
    GatherEntry e{};
    e.source_rows = static_cast<int32_t>(source_rows);
    e.source_columns = static_cast<int32_t>(source_columns);
    e.rows = rows ? static_cast<int32_t>(rows->size()) : e.source_rows;
    e.columns = columns ? static_cast<int32_t>(columns->size()) : e.source_columns;
    e.span = 1;
    if (rows) e.row_index = store(*rows, "rows", e.source_rows);
    if (columns) {
      e.column_index = store(*columns, "columns", e.source_columns);
      describe(*columns, e);
    }
    entries_.push_back(e);
  }

  std::vector<int32_t> words() const {
    const int64_t base = (sizeof(GatherHeader) + entries_.size() * sizeof(GatherEntry)) / 4;
    // vectors of 8 bytes are read from the bits
    const int64_t head = (base + 1) / 2 * 2;
    const int64_t total = head + static_cast<int64_t>(payload_.size());
    if (total > std::numeric_limits<int32_t>::max()) {
      throw std::invalid_argument("GatherTable: entries must have fewer than 2^31 indices");
    }
    std::vector<int32_t> all(head);
    const GatherHeader header{kGatherMagic, static_cast<int32_t>(total),
                              static_cast<int32_t>(entries_.size())};
    *reinterpret_cast<GatherHeader*>(all.data()) = header;
    auto* out = reinterpret_cast<GatherEntry*>(all.data() + sizeof(GatherHeader) / 4);
    for (GatherEntry e : entries_) {
      // the builder counts from 1 at the beginning of the payload
      for (int32_t* position :
           {&e.row_index, &e.column_index, &e.runs, &e.kept_bits, &e.filled_bits}) {
        if (*position) *position += static_cast<int32_t>(head) - 1;
      }
      *out++ = e;
    }
    all.insert(all.end(), payload_.begin(), payload_.end());
    return all;
  }

 private:
  int32_t put(const Index& numbers) {
    if (payload_.size() % 2) payload_.push_back(0);
    const auto position = static_cast<int32_t>(payload_.size()) + 1;
    payload_.insert(payload_.end(), numbers.begin(), numbers.end());
    // an empty index has a place of its own too
    if (numbers.empty()) payload_.push_back(0);
    return position;
  }

  int32_t store(const Index& index, const char* name, int32_t size) {
    for (int32_t i : index) {
      if (i < -1 || i >= size) {
        throw std::invalid_argument(std::string("GatherTable: ") + name +
                                    " must hold numbers from -1 to " + std::to_string(size - 1) +
                                    ", got " + std::to_string(i));
      }
    }
    const auto [found, is_new] = stored_.try_emplace(index, 0);
    if (is_new) found->second = put(index);
    return found->second;
  }

  // runs, bits and span of the columns
  void describe(const Index& index, GatherEntry& e) {
    const auto [found, is_new] = described_.try_emplace({e.column_index, e.source_columns}, e);
    if (is_new) {
      GatherEntry& d = found->second;
      const std::vector<GatherRun> runs = find_runs(index);
      Index pairs;
      for (const GatherRun& run : runs) pairs.insert(pairs.end(), {run.source, run.length});
      d.num_runs = static_cast<int32_t>(runs.size());
      d.runs = put(pairs);
      d.span = find_span(runs);
      int32_t kept = 0;
      const auto count = static_cast<int32_t>(index.size());
      while (kept < count && index[kept] >= 0 && (!kept || index[kept] > index[kept - 1])) ++kept;
      bool zeros = true;
      for (int32_t j = kept; j < count; ++j) zeros &= index[j] < 0;
      if (zeros) {
        d.kept_columns = kept;
        d.kept_bits = put(bits(e.source_columns, [&](int32_t j) { return index[j]; }, kept));
      }
      Index filled;
      bool in_order = true;
      for (int32_t j = 0; j < count; ++j) {
        if (index[j] < 0) continue;
        in_order &= index[j] == static_cast<int32_t>(filled.size());
        filled.push_back(j);
      }
      if (in_order && static_cast<int32_t>(filled.size()) == e.source_columns) {
        d.filled_bits = put(bits(count, [&](int32_t j) { return filled[j]; }, e.source_columns));
      }
    }
    const GatherEntry& d = found->second;
    e.runs = d.runs;
    e.num_runs = d.num_runs;
    e.span = d.span;
    e.kept_bits = d.kept_bits;
    e.kept_columns = d.kept_columns;
    e.filled_bits = d.filled_bits;
  }

  template <typename Position>
  static Index bits(int32_t size, Position position, int32_t count) {
    std::vector<uint32_t> set(words_of_bits(size));
    for (int32_t j = 0; j < count; ++j) set[position(j) / 32] |= 1u << position(j) % 32;
    return Index(set.begin(), set.end());
  }

  static std::vector<GatherRun> find_runs(const Index& index) {
    std::vector<GatherRun> runs;
    for (const int32_t i : index) {
      if (!runs.empty()) {
        GatherRun& last = runs.back();
        if (i < 0 ? last.source < 0 : last.source >= 0 && i == last.source + last.length) {
          ++last.length;
          continue;
        }
      }
      runs.push_back({i < 0 ? -1 : i, 1});
    }
    return runs;
  }

  static int32_t find_span(const std::vector<GatherRun>& runs) {
    int32_t span = kMostSpan, column = 0;
    for (const GatherRun& run : runs) {
      while ((run.source > 0 && run.source % span) || run.length % span || column % span) span /= 2;
      column += run.length;
    }
    return span;
  }

  std::vector<GatherEntry> entries_;
  std::vector<int32_t> payload_;
  std::map<Index, int32_t> stored_;
  std::map<std::pair<int32_t, int32_t>, GatherEntry> described_;
};

}  // namespace vitprune
