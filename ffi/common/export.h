// Handlers: the few symbols a library shows. Everything else is hidden.
#ifndef DSV4_COMMON_EXPORT_H_
#define DSV4_COMMON_EXPORT_H_

#ifdef _WIN32
#define DSV4_EXPORT __declspec(dllexport)
#else
#define DSV4_EXPORT __attribute__((visibility("default")))
#endif

// Declares a handler ahead of XLA_FFI_DEFINE_HANDLER_SYMBOL, which does not export it.
#define DSV4_EXPORT_HANDLER(name) extern "C" DSV4_EXPORT XLA_FFI_Error* name(XLA_FFI_CallFrame* call_frame)

// Defines a handler for CPUs, or one for GPUs that a CUDA graph may hold: function(context, args, results, attributes
// ...). What follows the function binds its attributes.
#define DSV4_CPU_HANDLER(name, function, ...) \
  DSV4_EXPORT_HANDLER(name);                  \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(              \
      name, function, xla::ffi::Ffi::Bind().Ctx<xla::ffi::ThreadPool>().RemainingArgs().RemainingRets() __VA_ARGS__)
#define DSV4_CUDA_HANDLER(name, function, ...)                                                                         \
  DSV4_EXPORT_HANDLER(name);                                                                                           \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(                                                                                       \
      name, function,                                                                                                  \
      xla::ffi::Ffi::Bind().Ctx<xla::ffi::PlatformStream<cudaStream_t>>().RemainingArgs().RemainingRets() __VA_ARGS__, \
      {xla::ffi::Traits::kCmdBufferCompatible})

#endif  // DSV4_COMMON_EXPORT_H_
