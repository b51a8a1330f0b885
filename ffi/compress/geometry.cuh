// The windows that the kernels of compress are compiled for.
#ifndef DSV4_COMPRESS_GEOMETRY_CUH_
#define DSV4_COMPRESS_GEOMETRY_CUH_

#include "cuda/geometry.cuh"

namespace dsv4 {

// Windows of kWindowRatio tokens with kWindowLanes lanes, whose entries are stored in the form; with two lanes they
// overlap.
template <typename StoredForm, int kWindowRatio, int kWindowLanes>
struct Windows {
  using Form = StoredForm;
  static constexpr int kRatio = kWindowRatio, kLanes = kWindowLanes, kDim = Form::kDim;
};

using Csa = Windows<V4Record, 4, 2>;
using CsaIndexer = Windows<V4Key, 4, 2>;
using Hca = Windows<V4Record, 128, 1>;

}  // namespace dsv4

#endif  // DSV4_COMPRESS_GEOMETRY_CUH_
