// Marks the few symbols a library shows: everything else is hidden.
#ifndef DSV4_COMMON_EXPORT_H_
#define DSV4_COMMON_EXPORT_H_

#ifdef _WIN32
#define DSV4_EXPORT __declspec(dllexport)
#else
#define DSV4_EXPORT __attribute__((visibility("default")))
#endif

// Declares a handler ahead of XLA_FFI_DEFINE_HANDLER_SYMBOL, which does not export it.
#define DSV4_EXPORT_HANDLER(name) extern "C" DSV4_EXPORT XLA_FFI_Error* name(XLA_FFI_CallFrame* call_frame)

#endif  // DSV4_COMMON_EXPORT_H_
