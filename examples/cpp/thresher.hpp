// Running a Thresher artifact from C++: the file, its hashes, its weights, its code. Needs TVM's runtime and OpenSSL's libcrypto.
//
//     auto model = thresher::load("model.thresher");              // or load("llama.thresher", "decode")
//     std::vector<thresher::Tensor> out = model({x});
//
// Everything is checked before a byte of code is loaded, but for one thing that Python's loader checks too: whether this CPU has the
// instructions that the artifact was built for (manifest: entries.*.code.cpu). Build for others with --target cpu:x86-64-v3.
#pragma once

#include <openssl/evp.h>
#include <sched.h>
#include <stdlib.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/dtype.h>
#include <tvm/ffi/extra/json.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>
#include <tvm/runtime/base.h>

namespace thresher {

namespace ffi = tvm::ffi;
using Tensor = ffi::Tensor;
using Json = ffi::json::Value;

constexpr int64_t kFormat = 4;

// What is wrong with a file or an argument, in words.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

namespace detail {

struct Memory {  // aligned as compiled code assumes it
  void AllocData(DLTensor* tensor) {
    size_t size = (ffi::GetDataSize(*tensor) + 63) / 64 * 64;
    tensor->data = aligned_alloc(64, size ? size : 64);
  }
  void FreeData(DLTensor* tensor) { free(tensor->data); }
};

}  // namespace detail

// A tensor for a CPU with room for its elements: tensor({1, 3, 224, 224}, "float32").
inline Tensor tensor(const std::vector<int64_t>& shape, const std::string& dtype) {
  return Tensor::FromNDAlloc(detail::Memory(), ffi::Shape(shape), ffi::StringToDLDataType(dtype), DLDevice{kDLCPU, 0});
}

namespace detail {

inline Json field(const Json& object, const std::string& name) {
  auto map = object.as<ffi::json::Object>();
  if (!map || !map->count(ffi::String(name))) throw Error("the manifest lacks " + name);
  return (*map)[ffi::String(name)];
}

inline std::string text(const Json& value) {
  auto found = value.as<ffi::String>();
  if (!found) throw Error("the manifest has something else where a text belongs");
  return *found;
}

inline int64_t number(const Json& value) {
  auto found = value.as<int64_t>();
  if (!found) throw Error("the manifest has something else where a whole number belongs");
  return *found;
}

inline ffi::json::Array list(const Json& value) {
  auto found = value.as<ffi::json::Array>();
  if (!found) throw Error("the manifest has something else where a list belongs");
  return *found;
}

inline Json parse(std::string_view data) {
  ffi::String wrong;
  Json value = ffi::json::Parse(ffi::String(data.data(), data.size()), &wrong);
  if (!wrong.empty()) throw Error("cannot read JSON: " + std::string(wrong));
  return value;
}

inline std::string sha256(std::string_view data) {
  unsigned char hash[32];
  if (!EVP_Digest(data.data(), data.size(), hash, nullptr, EVP_sha256(), nullptr)) throw Error("no SHA-256 here");
  std::string words;
  for (unsigned char byte : hash) {
    words += "0123456789abcdef"[byte >> 4];
    words += "0123456789abcdef"[byte & 15];
  }
  return words;
}

// What the manifest says of an entry's code: once, or once for each size of batches.
inline std::vector<Json> parts(const Json& code) {
  if (!code.cast<ffi::json::Object>().count(ffi::String("sizes"))) return {code};
  std::vector<Json> found;
  for (const auto& [size, part] : field(code, "sizes").cast<ffi::json::Object>()) found.push_back(part);
  return found;
}

// The members of a zip file without compression, as views into its bytes. Every place is checked against the file's end.
class Zip {
 public:
  explicit Zip(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) throw Error(path + " cannot be opened");
    bytes_.assign(std::istreambuf_iterator<char>(file), {});
    size_t end = bytes_.rfind("PK\x05\x06");
    if (end == std::string::npos) throw Error(path + " is damaged or not a Thresher artifact");
    size_t count = get(end + 10, 2), place = get(end + 16, 4);
    for (size_t i = 0; i < count; ++i) {
      if (get(place, 4) != 0x02014b50 || get(place + 10, 2) != 0 || get(place + 8, 2) & 1)
        throw Error(path + " is damaged: a member is compressed, encrypted or not there");
      size_t size = get(place + 24, 4), name = get(place + 28, 2), local = get(place + 42, 4);
      size_t start = local + 30 + get(local + 26, 2) + get(local + 28, 2);
      if (!members_.emplace(view(place + 46, name), view(start, size)).second)
        throw Error(path + " is damaged: it has a member twice");
      place += 46 + name + get(place + 30, 2) + get(place + 32, 2);
    }
  }

  const std::map<std::string, std::string_view>& members() const { return members_; }

  std::string_view operator[](const std::string& name) const {
    auto found = members_.find(name);
    if (found == members_.end()) throw Error("the artifact is damaged: it has no " + name);
    return found->second;
  }

 private:
  std::string_view view(size_t start, size_t size) const {
    if (start > bytes_.size() || size > bytes_.size() - start) throw Error("the artifact is damaged: it ends too early");
    return std::string_view(bytes_).substr(start, size);
  }

  size_t get(size_t place, size_t count) const {  // little-endian
    std::string_view raw = view(place, count);
    size_t value = 0;
    for (size_t i = count; i-- > 0;) value = value << 8 | static_cast<unsigned char>(raw[i]);
    return value;
  }

  std::string bytes_;
  std::map<std::string, std::string_view> members_;
};

// The tensors of a safetensors file. `dtypes` overrides what the file says: bfloat16 is stored as its bits.
inline std::map<std::string, Tensor> tensors(std::string_view data, const std::map<std::string, std::string>& dtypes) {
  static const std::map<std::string, std::string> known = {
      {"F64", "float64"}, {"F32", "float32"}, {"F16", "float16"}, {"BF16", "bfloat16"}, {"I64", "int64"}, {"I32", "int32"},
      {"I16", "int16"},   {"I8", "int8"},     {"U8", "uint8"},    {"U16", "uint16"},    {"BOOL", "bool"}};
  if (data.size() < 8) throw Error("the artifact is damaged: a tensor file without a header");
  uint64_t length;
  std::memcpy(&length, data.data(), 8);
  if (length > data.size() - 8) throw Error("the artifact is damaged: a tensor file without a header");
  std::string_view body = data.substr(8 + length);
  std::map<std::string, Tensor> found;
  for (auto [key, entry] : parse(data.substr(8, length)).cast<ffi::json::Object>()) {
    std::string name = text(key), dtype;
    if (name == "__metadata__") continue;
    if (auto given = dtypes.find(name); given != dtypes.end()) dtype = given->second;
    else if (auto kind = known.find(text(field(entry, "dtype"))); kind != known.end()) dtype = kind->second;
    else throw Error("the artifact has a tensor of an unknown type");
    std::vector<int64_t> shape;
    for (const Json& size : list(field(entry, "shape"))) shape.push_back(number(size));
    auto ends = list(field(entry, "data_offsets"));
    size_t start = number(ends[0]), end = number(ends[1]);
    Tensor made = tensor(shape, dtype);
    if (start > end || end > body.size() || end - start != ffi::GetDataSize(made))
      throw Error("the artifact is damaged: " + name + " does not lie in its file");
    std::memcpy(made.data_ptr(), body.data() + start, end - start);
    found.emplace(name, made);
  }
  return found;
}

// The library in `code`: the system's loader wants a file, which is gone when this returns.
inline ffi::Module library(std::string_view code) {
  char folder[] = "/tmp/thresher-XXXXXX";
  if (!mkdtemp(folder)) throw Error("cannot make a folder in /tmp");
  std::string path = std::string(folder) + "/model.so";
  std::ofstream(path, std::ios::binary).write(code.data(), static_cast<std::streamsize>(code.size()));
  try {
    ffi::Module module = ffi::Module::LoadFromFile(path);
    unlink(path.c_str());
    rmdir(folder);
    return module;
  } catch (...) {
    unlink(path.c_str());
    rmdir(folder);
    throw;
  }
}

inline double at(const Tensor& tensor, size_t i) {
  const void* data = static_cast<const char*>(tensor.data_ptr()) + tensor.byte_offset();
  DLDataType type = tensor.dtype();
  if (type.code == kDLFloat && type.bits == 32) return static_cast<const float*>(data)[i];
  if (type.code == kDLFloat && type.bits == 64) return static_cast<const double*>(data)[i];
  if (type.code == kDLInt && type.bits == 64) return static_cast<double>(static_cast<const int64_t*>(data)[i]);
  if (type.code == kDLInt && type.bits == 32) return static_cast<const int32_t*>(data)[i];
  if (type.bits == 8) return static_cast<const uint8_t*>(data)[i];
  throw Error("cannot compare tensors of " + std::string(ffi::DLDataTypeToString(type)));
}

}  // namespace detail

// One tensor that a model takes. A size of -1 may be any, the same for the same symbol.
struct Input {
  std::string name, dtype;
  std::vector<int64_t> shape;
  std::vector<std::string> symbols;  // of each dimension; empty where the size is fixed
};

namespace detail {

// Compiled code with its weights.
class Code {
 public:
  Code(std::string_view library_bytes, const Json& code, const std::map<std::string, Tensor>& weights) {
    if (!list(field(code, "library")).empty()) throw Error("this artifact needs torch: build it with library='never'");
    if (text(field(code, "device")) != "cpu") throw Error("this example runs artifacts for CPUs");
    for (const Json& stored : list(field(code, "weights"))) weights_.push_back(weights.at(text(field(stored, "name"))));
    machine_ = library(library_bytes)->GetFunction("vm_load_executable").value()().cast<ffi::Module>();
    (*machine_)->GetFunction("vm_initialization").value()(static_cast<int>(kDLCPU), 0, 2);  // 2: memory is kept for the next call
    main_ = (*machine_)->GetFunction("main").value();
  }

  std::vector<Tensor> operator()(const std::vector<Tensor>& given) const {
    std::vector<ffi::AnyView> arguments(given.begin(), given.end());
    arguments.push_back(weights_);
    ffi::Any result;
    main_.CallPacked(arguments.data(), static_cast<int32_t>(arguments.size()), &result);
    auto outputs = result.cast<ffi::Array<ffi::Tensor>>();
    return {outputs.begin(), outputs.end()};
  }

 private:
  ffi::Array<ffi::Tensor> weights_;
  std::optional<ffi::Module> machine_;
  ffi::Function main_;
};

inline size_t bytes_of_sample(const Tensor& x) { return x.shape()[0] ? ffi::GetDataSize(x) / x.shape()[0] : 0; }

inline std::vector<int64_t> with_first(const Tensor& x, int64_t size) {
  std::vector<int64_t> shape(x.shape().begin(), x.shape().end());
  shape[0] = size;
  return shape;
}

// Samples from `start` on; where there are fewer than `size`, the last one again.
inline Tensor samples(const Tensor& x, int64_t start, int64_t size) {
  Tensor part = tensor(with_first(x, size), std::string(ffi::DLDataTypeToString(x.dtype())));
  size_t each = bytes_of_sample(x);
  for (int64_t i = 0; i < size; ++i)
    std::memcpy(static_cast<char*>(part.data_ptr()) + i * each,
                static_cast<const char*>(x.data_ptr()) + x.byte_offset() + std::min(start + i, x.shape()[0] - 1) * each, each);
  return part;
}

// The index among the tensors of an input that is counted among all, literal ones, too.
inline size_t tensor_index(const Json& signature, int64_t index) {
  size_t tensors = 0;
  auto inputs = list(field(signature, "inputs"));
  for (int64_t i = 0; i < index; ++i) tensors += inputs[i].cast<ffi::json::Object>().count(ffi::String("shape"));
  return tensors;
}

}  // namespace detail

// One model of an artifact. Calls from several threads wait for each other.
class Model {
 public:
  Model(const detail::Zip& zip, const Json& entry, const std::string& name, const std::map<std::string, Tensor>& weights)
      : lock_(std::make_unique<std::mutex>()) {
    using namespace detail;
    Json code = field(entry, "code"), signature = field(entry, "signature");
    if (text(field(entry, "backend")) != "tvm") throw Error("this artifact needs torch: build it with backend='tvm'");
    for (const Json& input : list(field(signature, "inputs"))) {
      if (!input.cast<ffi::json::Object>().count(ffi::String("shape"))) continue;  // a number that was fixed when it was captured
      Input found{text(field(input, "name")), text(field(input, "dtype")), {}, {}};
      for (const Json& size : list(field(input, "shape"))) {
        auto fixed = size.as<int64_t>();
        found.shape.push_back(fixed ? *fixed : -1);
        found.symbols.push_back(fixed ? "" : text(size));
      }
      inputs_.push_back(found);
    }
    for (const Json& index : list(field(signature, "writes"))) writes_.push_back(tensor_index(signature, index.cast<int64_t>()));
    auto tensors_by_name = tensors(zip[name + "/reference_run.safetensors"], {});
    for (const char* side : {"inputs", "outputs"})
      for (const Json& value : list(field(field(entry, "reference_run"), side)))
        if (value.cast<ffi::json::Object>().count(ffi::String("tensor")))
          (side[0] == 'i' ? reference_inputs_ : reference_outputs_).push_back(tensors_by_name.at(text(field(value, "tensor"))));
    if (!code.cast<ffi::json::Object>().count(ffi::String("sizes"))) {
      codes_.emplace(0, Code(zip[name + "/model.so"], code, weights));
      return;
    }
    for (const auto& [size, part] : field(code, "sizes").cast<ffi::json::Object>()) {
      codes_.emplace(std::stoll(text(size)), Code(zip[name + "/" + text(size) + "/model.so"], part, weights));
      times_[std::stoll(text(size))] = field(field(code, "times"), text(size)).cast<double>();
    }
    for (const Json& batched : list(field(code, "batched"))) batched_.push_back(batched.cast<bool>());
  }

  // The arguments, and after them the state, if the model keeps some.
  const std::vector<Input>& inputs() const { return inputs_; }
  // For each of the last results, the index of the input whose new value it is.
  const std::vector<size_t>& writes() const { return writes_; }
  const std::vector<Tensor>& example() const { return reference_inputs_; }

  std::vector<Tensor> operator()(const std::vector<Tensor>& given) const {
    check(given);
    std::lock_guard<std::mutex> hold(*lock_);
    return codes_.count(0) ? codes_.at(0)(given) : in_pieces(given);
  }

  // The worst error, relative to the output's scale, against what the eager model said when this was built.
  double validate() const {
    std::vector<Tensor> found = (*this)(reference_inputs_);
    double worst = 0;
    if (found.size() != reference_outputs_.size()) throw Error("the model gives another number of results than the reference run has");
    for (size_t i = 0; i < found.size(); ++i) {
      double scale = 0, error = 0;
      size_t count = reference_outputs_[i].numel();
      if (static_cast<size_t>(found[i].numel()) != count) throw Error("a result has another size than the reference run has");
      for (size_t j = 0; j < count; ++j) {
        scale = std::max(scale, std::fabs(detail::at(reference_outputs_[i], j)));
        error = std::max(error, std::fabs(detail::at(found[i], j) - detail::at(reference_outputs_[i], j)));
      }
      worst = std::max(worst, scale > 0 ? error / scale : error);
    }
    return worst;
  }

 private:
  // A batch of any size by code for a few sizes: those that take the least time together, as runtime/batching.py does it.
  std::vector<Tensor> in_pieces(const std::vector<Tensor>& given) const {
    int64_t count = 0;
    for (size_t i = 0; i < given.size(); ++i)
      if (batched_.at(i)) count = given[i].shape()[0];
    if (count == 0) throw Error("a batch of no samples");
    std::vector<double> best(count + 1, 0);
    std::vector<int64_t> chosen(count + 1, 0);
    for (int64_t n = 1; n <= count; ++n)
      for (const auto& [size, time] : times_) {
        double together = time + best[std::max<int64_t>(n - size, 0)];
        if (!chosen[n] || together < best[n]) best[n] = together, chosen[n] = size;
      }
    std::vector<int64_t> sizes;
    for (int64_t left = count; left > 0; left -= chosen[left]) sizes.push_back(chosen[left]);
    std::sort(sizes.rbegin(), sizes.rend());
    std::vector<Tensor> results;
    int64_t done = 0;
    for (int64_t size : sizes) {
      std::vector<Tensor> part;
      for (size_t i = 0; i < given.size(); ++i) part.push_back(batched_[i] ? detail::samples(given[i], done, size) : given[i]);
      std::vector<Tensor> found = codes_.at(size)(part);
      for (size_t i = 0; i < found.size(); ++i) {
        if (!done) results.push_back(tensor(detail::with_first(found[i], count), std::string(ffi::DLDataTypeToString(found[i].dtype()))));
        size_t each = detail::bytes_of_sample(found[i]);
        std::memcpy(static_cast<char*>(results[i].data_ptr()) + done * each,
                    static_cast<const char*>(found[i].data_ptr()) + found[i].byte_offset(), std::min(size, count - done) * each);
      }
      done += size;
    }
    return results;
  }

  void check(const std::vector<Tensor>& given) const {
    if (given.size() != inputs_.size()) throw Error("the model takes " + std::to_string(inputs_.size()) + " tensors");
    std::map<std::string, int64_t> sizes;
    for (size_t i = 0; i < given.size(); ++i) {
      const Input& want = inputs_[i];
      bool fits = static_cast<size_t>(given[i].ndim()) == want.shape.size() &&
                  std::string(ffi::DLDataTypeToString(given[i].dtype())) == want.dtype && given[i].IsContiguous();
      for (size_t d = 0; fits && d < want.shape.size(); ++d) {
        int64_t size = given[i].shape()[d];
        fits = want.symbols[d].empty() ? size == want.shape[d] : sizes.emplace(want.symbols[d], size).first->second == size;
      }
      if (!fits) throw Error("argument '" + want.name + "' has not the type, the shape or the layout that the model was compiled for");
    }
  }

  std::vector<Input> inputs_;
  std::vector<size_t> writes_;
  std::vector<Tensor> reference_inputs_, reference_outputs_;
  std::map<int64_t, detail::Code> codes_;  // by the size of the batch; 0: the only one
  std::map<int64_t, double> times_;
  std::vector<bool> batched_;
  std::unique_ptr<std::mutex> lock_;
};

// Every model of an artifact, by name: "main" where there is one.
inline std::map<std::string, Model> load_all(const std::string& path) {
  using namespace detail;
  // TVM takes half of the logical CPUs by default, and pins its workers to them; the code is made for all that this process may use
  cpu_set_t cpus;
  if (sched_getaffinity(0, sizeof cpus, &cpus) == 0) setenv("TVM_NUM_THREADS", std::to_string(CPU_COUNT(&cpus)).c_str(), 0);
  setenv("TVM_BIND_THREADS", "0", 0);
  Zip zip(path);
  Json manifest = parse(zip["manifest.json"]);
  if (text(field(manifest, "magic")) != "thresher-artifact") throw Error(path + " is not a Thresher artifact");
  if (number(field(manifest, "format")) != kFormat) throw Error(path + " has another format: build it again");
  auto hashes = field(manifest, "hashes").cast<ffi::json::Object>();
  for (const auto& [name, data] : zip.members())
    if (name != "manifest.json" && (!hashes.count(ffi::String(name)) || text(hashes[ffi::String(name)]) != sha256(data)))
      throw Error(path + " is damaged: " + name + " does not have the hash that the manifest states");
  std::string built = text(field(field(manifest, "versions"), "tvm"));
  if (built.rfind(TVM_VERSION, 0) != 0) throw Error(path + " was built with TVM " + built + ", here is " TVM_VERSION);
  auto entries = field(manifest, "entries").cast<ffi::json::Object>();
  std::map<std::string, std::string> dtypes;
  for (const auto& [name, entry] : entries)
    for (const Json& part : parts(field(entry, "code")))
      for (const Json& stored : list(field(part, "weights"))) dtypes[text(field(stored, "name"))] = text(field(stored, "dtype"));
  auto weights = tensors(zip["weights.safetensors"], dtypes);  // shared by all entries
  std::map<std::string, Model> models;
  for (const auto& [name, entry] : entries) models.emplace(text(name), Model(zip, entry, text(name), weights));
  return models;
}

inline Model load(const std::string& path, const std::string& name = "main") {
  auto models = load_all(path);
  auto found = models.find(name);
  if (found == models.end()) throw Error(path + " has no model named " + name);
  return std::move(found->second);
}

}  // namespace thresher
