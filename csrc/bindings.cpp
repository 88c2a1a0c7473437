// The Python module: the only file that knows Python, by its stable ABI, so that one build serves all later versions.
#define Py_LIMITED_API 0x030B0000  // Python 3.11
#include <Python.h>
#include <c10/util/Exception.h>
#include <torch/headeronly/version.h>

#include <string>
#include <vector>

#include "cpu/isa/isa.h"

namespace moetrain {
namespace {

// C++ exceptions become Python's.
template <typename Work>
PyObject* guarded(const Work& work) {
    try {
        return work();
    } catch (const c10::ValueError& error) {
        PyErr_SetString(PyExc_ValueError, error.what_without_backtrace());
    } catch (const c10::Error& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what_without_backtrace());
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
    }
    return nullptr;
}

PyObject* text_of(const std::string& text) {
    return PyUnicode_FromStringAndSize(text.data(), static_cast<Py_ssize_t>(text.size()));
}

PyObject* list_of(const std::vector<std::string>& names) {
    PyObject* const list = PyList_New(0);
    for (const std::string& name : names) {
        PyObject* const text = list == nullptr ? nullptr : text_of(name);
        const bool appended = text != nullptr && PyList_Append(list, text) == 0;
        Py_XDECREF(text);
        if (appended) continue;
        Py_XDECREF(list);
        return nullptr;
    }
    return list;
}

// A function of Python's that takes nothing, and one that takes a string.
using Names = const std::vector<std::string>& (*)();
template <Names kNames>
PyObject* names(PyObject* /*module*/, PyObject* /*none*/) {
    return guarded([] { return list_of(kNames()); });
}

template <typename Work>
PyObject* with_string(PyObject* argument, const Work& work) {
    const char* const text = PyUnicode_AsUTF8AndSize(argument, nullptr);  // sets a TypeError where it is no string
    return text == nullptr ? nullptr : guarded([&] { return work(std::string(text)); });
}

PyObject* cpu_isa(PyObject* /*module*/, PyObject* /*none*/) {
    return guarded([] { return text_of(isa::isa_in_use()); });
}

PyObject* kernel_isa(PyObject* /*module*/, PyObject* dtype) {
    return with_string(dtype, [](const std::string& name) { return text_of(isa::kernel_isa(name)); });
}

PyObject* gemm_ceiling(PyObject* /*module*/, PyObject* dtype) {
    return with_string(dtype, [](const std::string& name) { return PyFloat_FromDouble(isa::gemm_ceiling(name)); });
}

#ifdef MOETRAIN_WITH_CUDA
constexpr bool kHasCuda = true;
#else
constexpr bool kHasCuda = false;
#endif

PyMethodDef kMethods[] = {
    {"cpu_isas", names<isa::usable_isas>, METH_NOARGS, "Instruction sets that expert_mlp can use here, best first."},
    {"built_isas", names<isa::built_isas>, METH_NOARGS,
     "Those that are compiled in, whatever the machine, best first."},
    {"machine_isas", names<isa::machine_isas>, METH_NOARGS, "Those that the machine can run, compiled in or not."},
    {"cpu_isa", cpu_isa, METH_NOARGS, "The one in use: MOETRAIN_CPU_ISA, or the best."},
    {"kernel_isa", kernel_isa, METH_O, "What the kernels that run for a dtype say they are compiled for."},
    {"gemm_ceiling", gemm_ceiling, METH_O, "TFLOP/s that one thread's tile products reach in cache."},
    {nullptr, nullptr, 0, nullptr},
};

// Whoever must not load the library finds this by reading it: see moetrain/built_with.py.
constexpr char kBuiltWith[] = "moetrain built with torch " TORCH_VERSION;

int add_constants(PyObject* module) {
    if (PyModule_AddStringConstant(module, "built_with", kBuiltWith) < 0) return -1;
    return PyModule_AddObjectRef(module, "has_cuda", kHasCuda ? Py_True : Py_False);
}

PyModuleDef_Slot kSlots[] = {
    {Py_mod_exec, reinterpret_cast<void*>(add_constants)},
    {0, nullptr},
};

PyModuleDef kModule = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "_C",
    .m_doc = "Native part of moetrain: tensor ops live in torch.ops.moetrain.",
    .m_size = 0,
    .m_methods = kMethods,
    .m_slots = kSlots,
    .m_traverse = nullptr,
    .m_clear = nullptr,
    .m_free = nullptr,
};

}  // namespace
}  // namespace moetrain

PyMODINIT_FUNC PyInit__C() { return PyModuleDef_Init(&moetrain::kModule); }
