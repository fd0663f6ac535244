// One exponential for each logit, by the core's own exp, with everything in the first cache: the arithmetic that no
// softmax can do without, and nothing else.
#include "../../csrc/cpu/walk.h"

// `count` exponentials of the numbers z [width], again and again, into out [width].
extern "C" void exponentials(long count, long width, const float* z, float* out) {
  for (; count > 0; count -= width)
    l2t::each<float>(width,
                     [&](int64_t j, auto which) { which.store(out + j, l2t::exp(which.load(z + j))); });
}
