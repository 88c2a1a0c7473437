// Calls an operator's C++ function with arguments from torch's stack of values. torch's own templates for this make
// compiling an operator's registration take longer than compiling the operator.
#pragma once
#include <ATen/core/stack.h>

#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "ops/common/optional.h"

namespace moetrain::boxed {

// A value as an argument of type T; what it refers to lives as long as it.
template <typename T>
struct Argument {
    using Plain = std::remove_cvref_t<T>;
    static auto held_of(const c10::IValue& value) {
        if constexpr (std::is_same_v<Plain, at::Tensor>) {
            return value.toTensor();
        } else if constexpr (std::is_same_v<Plain, OptionalTensor>) {
            return value.isNone() ? Plain() : Plain(value.toTensor());
        } else if constexpr (std::is_same_v<Plain, at::TensorList>) {
            return value.toTensorVector();
        } else if constexpr (std::is_same_v<Plain, at::ScalarType>) {
            return value.toScalarType();
        } else if constexpr (std::is_same_v<Plain, bool>) {
            return value.toBool();
        } else if constexpr (std::is_same_v<Plain, double>) {
            return value.toDouble();
        } else if constexpr (std::is_same_v<Plain, int64_t>) {
            return value.toInt();
        } else {
            static_assert(std::is_same_v<Plain, std::string_view> || std::is_same_v<Plain, std::string>);
            return Plain(value.toStringView());
        }
    }

    explicit Argument(const c10::IValue& value) : held(held_of(value)) {}
    operator T() { return static_cast<T>(held); }  // NOLINT: it is what the function takes

    decltype(held_of(std::declval<c10::IValue>())) held;
};

template <typename... Results, size_t... kIndex>
void push_all(torch::jit::Stack& stack, std::tuple<Results...>&& results, std::index_sequence<kIndex...> /*indices*/) {
    (stack.emplace_back(std::move(std::get<kIndex>(results))), ...);
}

template <typename Result, typename... Arguments, size_t... kIndex>
void call_with(Result (*function)(Arguments...), torch::jit::Stack& stack, std::index_sequence<kIndex...> /*indices*/) {
    constexpr size_t kCount = sizeof...(Arguments);
    const c10::IValue* const first = stack.data() + (stack.size() - kCount);
    if constexpr (std::is_void_v<Result>) {
        function(Argument<Arguments>(first[kIndex])...);
        torch::jit::drop(stack, kCount);
    } else {
        Result result = function(Argument<Arguments>(first[kIndex])...);
        torch::jit::drop(stack, kCount);
        if constexpr (std::is_same_v<Result, at::Tensor>) {
            stack.emplace_back(std::move(result));
        } else {
            push_all(stack, std::move(result), std::make_index_sequence<std::tuple_size_v<Result>>());
        }
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

}  // namespace moetrain::boxed
