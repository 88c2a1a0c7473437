// Arguments of an operator that travel together, as one struct. torch's schema lists them one by one; boxed.h fills the
// struct with as many values, in order. Adding an option to an operator is a field here, and its name in the schema:
//
//     struct Groups {
//         at::Tensor offset_E1;
//         OptionalTensor slot_E;
//         using Fields = FieldTypes<at::Tensor, OptionalTensor>;
//     };
//
// A field may be such a struct itself, and so may a base class, which comes first.
#pragma once

namespace moetrain {

template <typename... Types>
struct FieldTypes {};

template <typename T>
concept HasFields = requires { typename T::Fields; };

}  // namespace moetrain
