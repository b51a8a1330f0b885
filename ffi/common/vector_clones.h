// Marks a function to be compiled also for x86-64-v3 (AVX2 and FMA), and that version taken where the processor has
// them.
#ifndef DSV4_COMMON_VECTOR_CLONES_H_
#define DSV4_COMMON_VECTOR_CLONES_H_

// By feature level and not by processor: "arch=haswell" is never taken on an AMD processor.
#if defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__) && defined(__x86_64__) && defined(__gnu_linux__)
#define DSV4_VECTOR_CLONES __attribute__((target_clones("default", "arch=x86-64-v3")))
#else
#define DSV4_VECTOR_CLONES
#endif

#endif  // DSV4_COMMON_VECTOR_CLONES_H_
