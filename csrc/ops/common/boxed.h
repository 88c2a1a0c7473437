// Calls an operator's C++ function with arguments from torch's stack of values. torch's own templates for this make
// compiling an operator's registration take longer than compiling the operator, and know no structs (fields.h).
#pragma once
#include <ATen/core/stack.h>
#include <torch/library.h>

#include <array>
#include <memory>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "ops/common/fields.h"
#include "ops/common/optional.h"

namespace moetrain::boxed {

// How many values of the stack make one of type T.
template <typename T>
struct NumValues {
    static constexpr size_t kCount = 1;
};
template <typename... Types>
struct NumValues<FieldTypes<Types...>> {
    static constexpr size_t kCount = (NumValues<Types>::kCount + ...);
};
template <HasFields T>
struct NumValues<T> : NumValues<typename T::Fields> {};

template <typename T>
auto take(const c10::IValue*& next);

template <typename Struct, typename... Types>
Struct take_fields(const c10::IValue*& next, FieldTypes<Types...> /*types*/) {
    static_assert(!requires { Struct{std::declval<Types>()..., {}}; }, "the struct has more fields than its Fields");
    return Struct{take<Types>(next)...};  // braces: in order
}

// The next value as a T, or what a T refers to; what that refers to in turn lives as long as the stack's values.
template <typename T>
auto take(const c10::IValue*& next) {
    if constexpr (HasFields<T>) {
        return take_fields<T>(next, typename T::Fields());
    } else {
        const c10::IValue& value = *next++;
        if constexpr (std::is_same_v<T, at::Tensor>) {
            return value.toTensor();
        } else if constexpr (std::is_same_v<T, OptionalTensor>) {
            return value.isNone() ? OptionalTensor() : OptionalTensor(value.toTensor());
        } else if constexpr (std::is_same_v<T, at::TensorList>) {
            return value.toTensorVector();
        } else if constexpr (std::is_same_v<T, at::ScalarType>) {
            return value.toScalarType();
        } else if constexpr (std::is_same_v<T, bool>) {
            return value.toBool();
        } else if constexpr (std::is_same_v<T, double>) {
            return value.toDouble();
        } else if constexpr (std::is_same_v<T, int64_t>) {
            return value.toInt();
        } else {
            static_assert(std::is_same_v<T, std::string_view>);
            return value.toStringView();
        }
    }
}

// An argument of type T of a function.
template <typename T>
struct Argument {
    using Plain = std::remove_cvref_t<T>;
    explicit Argument(const c10::IValue* first) : held(take<Plain>(first)) {}
    operator T() {  // NOLINT: it is what the function takes
        if constexpr (std::is_same_v<T, decltype(held)>) {
            return std::move(held);
        } else {
            return static_cast<T>(held);
        }
    }

    decltype(take<Plain>(std::declval<const c10::IValue*&>())) held;
};

// Where each argument's values begin, and at the end their number.
template <typename... Arguments>
constexpr auto first_values() {
    std::array<size_t, sizeof...(Arguments) + 1> first{};
    size_t idx = 0;
    ((first[idx + 1] = first[idx] + NumValues<std::remove_cvref_t<Arguments>>::kCount, ++idx), ...);
    return first;
}

template <typename Result>
void push(torch::jit::Stack& stack, Result&& result) {
    stack.emplace_back(std::forward<Result>(result));
}
template <typename... Results>
void push(torch::jit::Stack& stack, std::tuple<Results...>&& results) {
    std::apply([&](Results&... each) { (stack.emplace_back(std::move(each)), ...); }, results);
}

template <typename Result, typename... Arguments, size_t... kIndex>
void call_with(Result (*function)(Arguments...), torch::jit::Stack& stack, std::index_sequence<kIndex...> /*indices*/) {
    constexpr auto kFirst = first_values<Arguments...>();
    const c10::IValue* const first = stack.data() + (stack.size() - kFirst.back());
    if constexpr (std::is_void_v<Result>) {
        function(Argument<Arguments>(first + kFirst[kIndex])...);
        torch::jit::drop(stack, kFirst.back());
    } else {
        Result result = function(Argument<Arguments>(first + kFirst[kIndex])...);
        torch::jit::drop(stack, kFirst.back());
        push(stack, std::move(result));
    }
}

template <typename Result, typename... Arguments>
constexpr size_t count_arguments(Result (* /*function*/)(Arguments...)) {
    return sizeof...(Arguments);
}

// Takes the arguments of kFunction off the stack and puts its results there.
template <auto kFunction>
void call(torch::jit::Stack& stack) {
    call_with(kFunction, stack, std::make_index_sequence<count_arguments(kFunction)>());
}

// One class for all operators, so that torch's templates are compiled once.
class Kernel : public c10::OperatorKernel {
 public:
    using Call = void (*)(torch::jit::Stack& stack);
    explicit Kernel(Call call) : call_(call) {}
    void operator()(const c10::OperatorHandle& /*op*/, c10::DispatchKeySet /*keys*/, torch::jit::Stack* stack) {
        call_(*stack);
    }

 private:
    Call call_;
};

// What m.impl takes for kFunction.
template <auto kFunction>
torch::CppFunction kernel() {
    return torch::CppFunction::makeFromBoxedFunctor(std::make_unique<Kernel>(&call<kFunction>));
}

}  // namespace moetrain::boxed
