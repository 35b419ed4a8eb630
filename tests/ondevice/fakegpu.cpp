// Two CUDA devices made of host memory, for a torch without CUDA: see fakegpu.py.
//
// A device tensor's storage holds on to a host storage, and every operator runs the CPU's kernel on tensors over those.
// On the way the rules of a real device are kept: tensors of different devices do not meet, operators without a CUDA
// kernel do not run, and what makes the host wait is counted.
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/enum_tag.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <sstream>
#include <unordered_map>
#include <unordered_set>

namespace {

using at::Tensor;
using c10::Device;
using c10::DeviceType;
using c10::IValue;
using torch::jit::Stack;

constexpr c10::DeviceIndex COUNT = 2;
thread_local c10::DeviceIndex current = 0;

// --- what is told to Python -----------------------------------------------------------------------------------------

enum Event { WAIT, UPLOAD, DOWNLOAD, KERNEL, EVENTS };
std::atomic<int64_t> counts[EVENTS], bytes[EVENTS];
void (*listener)(int event, const char* op, int64_t size) = nullptr;
std::unordered_set<std::string> without_kernel;
bool has_doubles = true;

void tell(Event event, const std::string& op, int64_t size = 0) {
  ++counts[event];
  bytes[event] += size;
  if (listener && event != KERNEL) listener(event, op.c_str(), size);
}

// --- the device as torch asks for it --------------------------------------------------------------------------------

struct Guard final : c10::impl::DeviceGuardImplInterface {
  using Index = c10::DeviceIndex;
  DeviceType type() const override { return DeviceType::CUDA; }
  Device getDevice() const override { return {DeviceType::CUDA, current}; }
  void uncheckedSetDevice(Device to) const noexcept override { current = std::max<Index>(to.index(), 0); }
  void setDevice(Device to) const override {
    TORCH_CHECK(to.index() < COUNT, "CUDA error: invalid device ordinal");
    uncheckedSetDevice(to);
  }
  Device exchangeDevice(Device to) const override {
    Device before = getDevice();
    setDevice(to);
    return before;
  }
  Index deviceCount() const noexcept override { return COUNT; }
  c10::Stream getStream(Device of) const override {
    return c10::Stream(c10::Stream::DEFAULT, of.has_index() ? of : getDevice());
  }
  c10::Stream getDefaultStream(Device of) const override { return getStream(of); }
  c10::Stream getNewStream(Device of, int) const override { return getStream(of); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(const Index) const override {}
  // Work is done when it is queued, so that an event is over once it is recorded.
  void record(void** event, const c10::Stream&, const Index, const c10::EventFlag) const override { *event = &current; }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void destroyEvent(void*, const Index) const noexcept override {}
};
c10::impl::DeviceGuardImplRegistrar registered(DeviceType::CUDA, new Guard());

}  // namespace

// Its name is what torch looks for in the registry.
struct CUDAHooks final : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return COUNT; }
  int getNumGPUs() const override { return COUNT; }
  c10::DeviceIndex current_device() const override { return current; }
  c10::DeviceIndex getCurrentDevice() const override { return current; }
  void deviceSynchronize(c10::DeviceIndex) const override {}
};
namespace at {
REGISTER_CUDA_HOOKS(CUDAHooks)
}

namespace {

// --- memory ---------------------------------------------------------------------------------------------------------

// What the data pointer of a device's storage carries along.
struct Held {
  c10::Storage host;
};
void let_go(void* held) { delete static_cast<Held*>(held); }

c10::DataPtr pointer_to(const c10::Storage& host, Device device) {
  return {host.mutable_data(), new Held{host}, &let_go, device};
}

const c10::Storage& host_of(const Tensor& tensor) {
  auto* held = tensor.storage().data_ptr().cast_context<Held>(&let_go);
  TORCH_CHECK(held, "a tensor on ", tensor.device(), " that the fake device did not make");
  return held->host;
}

Tensor over(c10::Storage storage, c10::DispatchKey key, const Tensor& like) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), like.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return made;
}

// The tensors of one call: what each device tensor is on the host, and the way back.
class Translation {
 public:
  Tensor to_host(const Tensor& tensor) {
    if (!tensor.defined() || !tensor.is_cuda()) return tensor;
    devices.push_back(tensor.device());
    pairs.push_back({tensor, over(host_of(tensor), c10::DispatchKey::CPU, tensor)});
    storages.emplace(host_of(tensor).unsafeGetStorageImpl(), tensor.storage());
    return pairs.back().second;
  }

  // A kernel may have resized an output, or given it another shape.
  void bring_back_shapes() {
    for (auto& [ours, its] : pairs) {
      c10::Storage storage = ours.storage();
      if (storage.data() != its.storage().data() || storage.nbytes() != its.storage().nbytes()) {
        storage.set_data_ptr(pointer_to(its.storage(), ours.device()));
        storage.set_nbytes(its.storage().nbytes());
      }
      auto* impl = ours.unsafeGetTensorImpl();
      if (impl->sizes() != its.sizes() || impl->strides() != its.strides())
        impl->set_sizes_and_strides(its.sizes(), its.strides(), its.storage_offset());
    }
  }

  Tensor to_device(const Tensor& result, Device device) {
    if (!result.defined()) return result;
    for (auto& [ours, its] : pairs)
      if (result.is_same(its)) return ours;
    TORCH_CHECK_TYPE(has_doubles || !(result.scalar_type() == at::kDouble || result.scalar_type() == at::kComplexDouble),
                     "this device has no float64");
    const c10::Storage& host = result.storage();
    auto known = storages.find(host.unsafeGetStorageImpl());
    if (known == storages.end()) {
      c10::Storage fresh(c10::Storage::use_byte_size_t(), host.nbytes(), pointer_to(host, device), nullptr, false);
      known = storages.emplace(host.unsafeGetStorageImpl(), fresh).first;
    }
    return over(known->second, c10::DispatchKey::CUDA, result);
  }

  std::vector<Device> devices;

 private:
  std::vector<std::pair<Tensor, Tensor>> pairs;
  std::unordered_map<c10::StorageImpl*, c10::Storage> storages;
};

// `change` for every tensor in a value, lists of tensors included.
template <typename Change>
void each_tensor(IValue& value, Change change) {
  if (value.isTensor()) {
    value = change(value.toTensor());
  } else if (value.isTensorList()) {
    c10::List<Tensor> list;
    for (const Tensor& tensor : value.toTensorVector()) list.push_back(change(tensor));
    value = list;
  } else if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> list;
    for (const std::optional<Tensor>& tensor : value.toOptionalTensorVector())
      list.push_back(tensor ? std::optional<Tensor>(change(*tensor)) : std::nullopt);
    value = list;
  }
}

// --- the rules of a real device -------------------------------------------------------------------------------------

// Operators whose CUDA kernels copy something to the host and wait for it.
const std::unordered_set<std::string> WAITING = {
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim",
    "unique_consecutive", "bincount", "repeat_interleave", "histc", "multinomial", "_linalg_check_errors",
    "_linalg_eigh", "_linalg_svd", "linalg_eig", "linalg_lstsq"};
// Operators that take a number from a tensor without dimensions, wherever it is, beside those tagged pointwise.
const std::unordered_set<std::string> TAKING_NUMBERS = {
    "where", "masked_fill", "masked_fill_", "fill_", "fill", "lerp", "lerp_", "addcmul", "addcmul_", "addcdiv",
    "addcdiv_", "clamp", "clamp_", "copysign"};

struct Call {
  const c10::OperatorHandle& op;
  std::string name;  // without namespace, overload and trailing details
  std::vector<Tensor> tensors, indices;

  Call(const c10::OperatorHandle& op, const Stack& stack, size_t first) : op(op) {
    name = op.schema().name().substr(op.schema().name().find("::") + 2);
    indexing = name == "index" || name == "index_put" || name == "index_put_" || name == "_index_put_impl_" ||
               name == "_unsafe_index" || name == "_unsafe_index_put";
    for (size_t at = first; at < stack.size(); ++at) {
      IValue value = stack[at];
      each_tensor(value, [&](const Tensor& tensor) {
        if (tensor.defined()) (indexing && at == first + 1 ? indices : tensors).push_back(tensor);
        return tensor;
      });
    }
  }

  bool is_view() const {
    for (auto& result : op.schema().returns())
      if (result.alias_info() && !result.alias_info()->isWrite()) return true;
    return name.rfind("empty", 0) == 0 || name.rfind("new_empty", 0) == 0;
  }

  // CUDA takes numbers and indices from the host, and nothing else from elsewhere.
  void check_devices() const {
    bool numbers = op.hasTag(at::Tag::pointwise) || TAKING_NUMBERS.count(name) || indexing;
    std::optional<Device> here;
    auto meet = [&](const Tensor& tensor, bool may_come) {
      if (may_come && tensor.is_cpu()) return;
      if (!here) here = tensor.device();
      TORCH_CHECK(*here == tensor.device(), "Expected all tensors to be on the same device, but found at least two "
                  "devices, ", *here, " and ", tensor.device(), "! (", op.schema().name(), ")");
    };
    bool first_stays = indexing || name.back() == '_';
    for (size_t i = 0; i < tensors.size(); ++i) {
      bool number = tensors[i].dim() == 0 && (i > 0 || !first_stays);
      meet(tensors[i], numbers && number);
    }
    for (auto& index : indices) meet(index, !tensors.empty() && tensors[0].is_cuda());
  }

  void note_waits() const {
    if (WAITING.count(name)) tell(WAIT, name);
    if (name == "index") return;  // torch brings its indices to the device before it comes here
    for (auto& index : indices) {
      bool mask = index.scalar_type() == at::kBool || index.scalar_type() == at::kByte;
      if (index.is_cpu()) tell(UPLOAD, "index from the host", index.nbytes()), tell(WAIT, "index from the host");
      if (mask) tell(WAIT, "index by a mask");
    }
  }

  bool indexing;
};

void note_copy(const Tensor& to, const Tensor& from, bool non_blocking) {
  if (from.is_cuda() && to.is_cpu() && from.numel()) {
    tell(DOWNLOAD, "copy", from.nbytes());
    tell(WAIT, "copy to the host");  // into pageable memory, even where it is called non-blocking
  } else if (from.is_cpu() && to.is_cuda() && from.numel()) {
    tell(UPLOAD, "copy", from.nbytes());
    if (!non_blocking) tell(WAIT, "copy from the host");
  } else {
    tell(KERNEL, "copy");
  }
}

void check(const c10::OperatorHandle& op, const Stack& stack, size_t first) {
  Call call(op, stack, first);
  if (call.name == "copy_") return note_copy(stack[first].toTensor(), stack[first + 1].toTensor(), stack[first + 2].toBool());
  std::string overload = op.schema().overload_name();
  std::string whole = overload.empty() ? call.name : call.name + "." + overload;
  bool of_the_cpu = op.schema().name().find("dnn") != std::string::npos && call.name.rfind("cudnn", 0) != 0;
  TORCH_CHECK_NOT_IMPLEMENTED(!of_the_cpu && !without_kernel.count(whole), op.schema().name(), ": no kernel for CUDA");
  call.check_devices();
  call.note_waits();
  if (!call.is_view()) tell(KERNEL, call.name);
}

// --- every operator -------------------------------------------------------------------------------------------------

void on_host(const c10::OperatorHandle& op, Stack* stack) {
  const size_t first = stack->size() - op.schema().arguments().size();
  check(op, *stack, first);
  Translation translation;
  std::optional<Device> asked;
  for (size_t at = first; at < stack->size(); ++at) {
    IValue& value = (*stack)[at];
    if (value.isDevice() && value.toDevice().is_cuda()) {
      asked = value.toDevice();
      value = Device(DeviceType::CPU);
    } else {
      each_tensor(value, [&](const Tensor& tensor) { return translation.to_host(tensor); });
    }
  }
  Device device(DeviceType::CUDA, current);
  if (!translation.devices.empty()) device = translation.devices[0];
  if (asked && asked->has_index()) device = *asked;
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  translation.bring_back_shapes();
  for (size_t at = stack->size() - op.schema().returns().size(); at < stack->size(); ++at)
    each_tensor((*stack)[at], [&](const Tensor& tensor) { return translation.to_device(tensor, device); });
}

// Attention is computed by products and a softmax, which every device has.
void no_fused_attention(const c10::OperatorHandle& op, Stack* stack) {
  torch::jit::drop(*stack, op.schema().arguments().size());
  stack->emplace_back(int64_t(0));
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_host>()); }
TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  for (auto name : {"copy_", "convolution", "convolution_backward"})  // one kernel for all devices else
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&on_host>());
  m.impl("_fused_sdp_choice", torch::CppFunction::makeFromBoxedFunction<&no_fused_attention>());
}

}  // namespace

extern "C" {
void fakegpu_listen(void (*to)(int, const char*, int64_t)) { listener = to; }
void fakegpu_doubles(bool there) { has_doubles = there; }
int64_t fakegpu_count(int event) { return counts[event]; }
int64_t fakegpu_bytes(int event) { return bytes[event]; }
void fakegpu_without_kernel(const char* names) {
  std::istringstream lines(names);
  for (std::string name; std::getline(lines, name);) without_kernel.insert(name);
}
}
