// The waist on the CPU: checks every call and hands it to the kernels of the instruction set in use, which is
// chosen at load by name.
//
// On x86-64 a build has three, unless L2T_BASELINE_ONLY says that loss.cpp was compiled once; elsewhere it has
// the baseline, which is what the compiler takes by itself.
// Deliberately not here: kernels, and the sentence for a wrong name in the environment (l2t/ops.py finds
// l2t_cpu_instruction_set() different from what was asked for).
#include "isa.h"

#include <cstdlib>
#include <cstring>

#include "../status.h"
#include "pages.h"

#if defined(__x86_64__) && !defined(L2T_BASELINE_ONLY)
#  define L2T_X86_64 1
#endif

namespace l2t {

namespace baseline {
extern const Kernels kernels;
}
#if L2T_X86_64
namespace v3 {
extern const Kernels kernels;
}
namespace v4 {
extern const Kernels kernels;
}
#endif

namespace {

// What the machine can run, best last.
struct InstructionSets {
  static constexpr int room = 3;
  const char* names[room + 1] = {};
  const Kernels* kernels[room] = {};
  int count = 0, used = 0;

  InstructionSets() {
    add("baseline", &baseline::kernels);
#if L2T_X86_64
    __builtin_cpu_init();
    if (__builtin_cpu_supports("x86-64-v3")) add("x86-64-v3", &v3::kernels);
    if (__builtin_cpu_supports("x86-64-v4")) add("x86-64-v4", &v4::kernels);
#endif
    used = count - 1;
    const char* wanted = std::getenv("L2T_INSTRUCTION_SET");
    if (wanted != nullptr) use(wanted);
  }

  void add(const char* name, const Kernels* table) {
    names[count] = name;
    kernels[count++] = table;
  }

  int use(const char* name) {
    for (int i = 0; i < count; ++i) {
      if (std::strcmp(names[i], name) == 0) {
        used = i;
        return 0;
      }
    }
    return -1;
  }
};

InstructionSets& instruction_sets() {
  static InstructionSets sets;
  return sets;
}

const Kernels& kernels() { return *instruction_sets().kernels[instruction_sets().used]; }

l2t_status check_all(const l2t_rows& rows, const l2t_tensors& inputs, const void* needed,
                     const void* also_needed) {
  const l2t_status status = check(rows, inputs);
  if (status != L2T_OK) return status;
  if (rows.threads < 1) return L2T_BAD_THREADS;
  if (rows.n > 0 && (needed == nullptr || also_needed == nullptr)) return L2T_MISSING_ROWS;
  if (l2t_check_target(rows.n, rows.groups * rows.c, rows.ignore_index, rows.target) >= 0)
    return L2T_BAD_TARGET;
  return L2T_OK;
}

void advise_output(const l2t_rows& rows, const l2t_tensors& inputs, void* d_logits) {
  const int64_t size = rows.dtype == L2T_FLOAT64 ? 8 : rows.dtype == L2T_FLOAT32 ? 4 : 2;
  if (d_logits != inputs.logits) advise_large_pages(d_logits, rows.n * rows.c * size);
}

l2t_status second_order(const l2t_rows* rows, const l2t_tensors* inputs, const void* stats,
                        const l2t_tensors* direction, const l2t_outputs* outputs) {
  if (stray_factors(*rows, *direction) || stray_factors(*rows, *outputs)) return L2T_STRAY_FACTORS;
  const l2t_status status = check_all(*rows, *inputs, stats, stats);
  if (status != L2T_OK) return status;
  advise_output(*rows, *inputs, outputs->logits);
  return kernels().second_order(*rows, *inputs, stats, *direction, *outputs);
}

}  // namespace
}  // namespace l2t

int64_t l2t_check_target(int64_t n, int64_t table_rows, int64_t ignore_index, const int64_t* target) {
  for (int64_t i = 0; i < n; ++i)
    if ((target[i] < 0 || target[i] >= table_rows) && target[i] != ignore_index) return i;
  return -1;
}

const char* const* l2t_cpu_instruction_sets(void) { return l2t::instruction_sets().names; }

const char* l2t_cpu_instruction_set(void) {
  return l2t::instruction_sets().names[l2t::instruction_sets().used];
}

int l2t_cpu_use_instruction_set(const char* name) { return l2t::instruction_sets().use(name); }

l2t_status l2t_cpu_value(const l2t_rows* rows, const l2t_tensors* inputs, void* loss, void* stats,
                         void* d_logits) {
  const l2t_status status = l2t::check_all(*rows, *inputs, loss, stats);
  if (status != L2T_OK) return status;
  l2t::advise_output(*rows, *inputs, d_logits);
  return l2t::kernels().value(*rows, *inputs, loss, stats, d_logits);
}

l2t_status l2t_cpu_grad(const l2t_rows* rows, const l2t_tensors* inputs, const void* stats,
                        const l2t_outputs* outputs) {
  if (l2t::stray_factors(*rows, *outputs)) return L2T_STRAY_FACTORS;
  const l2t_status status = l2t::check_all(*rows, *inputs, stats, stats);
  if (status != L2T_OK) return status;
  l2t::advise_output(*rows, *inputs, outputs->logits);
  return l2t::kernels().grad(*rows, *inputs, stats, *outputs);
}

l2t_status l2t_cpu_grad_vjp(const l2t_rows* rows, const l2t_tensors* inputs, const void* stats,
                            const l2t_tensors* cotangents, const l2t_outputs* outputs) {
  return l2t::second_order(rows, inputs, stats, cotangents, outputs);
}

l2t_status l2t_cpu_grad_jvp(const l2t_rows* rows, const l2t_tensors* inputs, const void* stats,
                            const l2t_tensors* tangents, const l2t_outputs* outputs) {
  return l2t::second_order(rows, inputs, stats, tangents, outputs);
}
