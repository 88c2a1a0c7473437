// torch.classes.moetrain.SparsePlan and SparseCollectives: what Python has of csrc/comm. Methods run without Python's
// lock, so that waiting for messages keeps no other thread from computing.
#include "ops/comm/sparse_collectives.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

namespace moetrain {
namespace {

using comm::SparseCollectives;
using comm::SparsePlan;
using CollectivesPtr = c10::intrusive_ptr<SparseCollectives>;
using PlanPtr = c10::intrusive_ptr<SparsePlan>;
using Group = c10::intrusive_ptr<c10d::ProcessGroup>;

// The operators of ops/chunks, of whatever device the tensors are on.
void copy_chunks_by_table(at::Tensor target, const at::Tensor& source, const at::Tensor& table_N3) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("moetrain::unpack_chunks_", "")
                               .typed<void(at::Tensor&, const at::Tensor&, const at::Tensor&)>();
    op.call(target, source, table_N3);
}

void sum_chunks_by_table(at::Tensor target, const std::vector<at::Tensor>& sources, const at::Tensor& table_N4) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("moetrain::add_sources_", "")
                               .typed<void(at::Tensor&, at::TensorList, const at::Tensor&)>();
    op.call(target, sources, table_N4);
}

PlanPtr new_plan(const at::Tensor& owner_ES, const at::Tensor& offset_E1, const at::Tensor& holder_Z,
                 int64_t num_groups, int64_t num_shards, int64_t rank, int64_t ranks_per_node, bool everywhere) {
    constexpr auto op = "SparsePlan";
    const auto placement = placement_arrays(op, owner_ES, offset_E1, holder_Z, num_groups, num_shards);
    return c10::make_intrusive<SparsePlan>(placement,
                                           viewpoint(op, rank, placement.num_ranks(), ranks_per_node, everywhere));
}

std::vector<int64_t> sent_chunks(const PlanPtr& plan, const std::string& collective) {
    return plan->count_sent(collective_of("SparsePlan.sent_chunks", collective));
}

std::vector<int64_t> num_staged(const PlanPtr& plan, const std::string& collective, bool converts) {
    const auto& program = plan->program(collective_of("SparsePlan.num_staged", collective), converts).program();
    return {program.num_messages, program.num_work};
}

// int64 [N, 2]: the peer and the chunk of each edge of a hop.
at::Tensor edges(const PlanPtr& plan, const std::string& collective, int64_t hop, bool sends) {
    constexpr auto op = "SparsePlan.edges";
    TORCH_CHECK_VALUE(hop >= 0 && hop < comm::kHops, op, ": hop must be 0 or 1, got ", hop);
    const auto& routes = plan->routes();
    const bool gathers = collective_of(op, collective) == comm::Collective::kAllGather;
    const auto& hops =
        gathers ? (sends ? routes.gather_out : routes.gather_in) : (sends ? routes.scatter_out : routes.scatter_in);
    auto table = at::empty({static_cast<int64_t>(hops[hop].size()), 2}, at::TensorOptions().dtype(at::kLong));
    auto* next = table.mutable_data_ptr<int64_t>();
    for (const auto& edge : hops[hop]) {
        *next++ = edge.peer;
        *next++ = routes.chunks[edge.chunk].id;
    }
    return table;
}

CollectivesPtr new_collectives(const std::optional<Group>& group, int64_t rank, int64_t ranks_per_node,
                               int64_t max_plans) {
    constexpr auto op = "SparseCollectives";
    const int64_t num_ranks = group ? (*group)->getSize() : 1;
    const auto from = viewpoint(op, rank, num_ranks, ranks_per_node, false);
    TORCH_CHECK_VALUE(max_plans >= 1, op, ": max_plans must be at least 1, got ", max_plans);
    return c10::make_intrusive<SparseCollectives>(comm::Site{group.value_or(Group()),
                                                             from.rank,
                                                             static_cast<int32_t>(num_ranks),
                                                             from.ranks_per_node,
                                                             {&copy_chunks_by_table, &sum_chunks_by_table},
                                                             static_cast<size_t>(max_plans)});
}

PlanPtr cached_plan(const CollectivesPtr& self, const at::Tensor& owner_ES, const at::Tensor& offset_E1,
                    const at::Tensor& holder_Z, int64_t num_groups, int64_t num_shards, bool everywhere) {
    constexpr auto op = "SparseCollectives.plan";
    const auto placement = placement_arrays(op, owner_ES, offset_E1, holder_Z, num_groups, num_shards);
    TORCH_CHECK_VALUE(placement.num_ranks() == self->site().num_ranks, op, ": the placement is for ",
                      placement.num_ranks(), " ranks but the group has ", self->site().num_ranks,
                      "; place experts on this group");
    return self->plan(placement, everywhere);
}

int64_t start_all_gather(const CollectivesPtr& self, const PlanPtr& plan, const at::Tensor& owned_CL,
                         const at::Tensor& held_HL, const std::string& purpose) {
    check_exchange("SparseCollectives.all_gather", self->site(), *plan, owned_CL, held_HL);
    return self->start(comm::Collective::kAllGather, plan, owned_CL, held_HL, purpose);
}

int64_t start_reduce_scatter(const CollectivesPtr& self, const PlanPtr& plan, const at::Tensor& held_HL,
                             const at::Tensor& owned_CL, const std::string& purpose) {
    constexpr auto op = "SparseCollectives.reduce_scatter";
    check_exchange(op, self->site(), *plan, owned_CL, held_HL);
    check_sum_types(op, owned_CL.scalar_type(), held_HL.scalar_type());
    return self->start(comm::Collective::kReduceScatter, plan, owned_CL, held_HL, purpose);
}

TORCH_LIBRARY_FRAGMENT(moetrain, m) {
    m.class_<SparsePlan>("SparsePlan")
        .def(torch::init(&new_plan))
        .def("rank", [](const PlanPtr& self) { return int64_t{self->viewpoint().rank}; })
        .def("num_ranks", [](const PlanPtr& self) { return int64_t{self->num_ranks()}; })
        .def("num_owned", [](const PlanPtr& self) { return int64_t{self->routes().num_owned}; })
        .def("num_held", [](const PlanPtr& self) { return int64_t{self->routes().num_held}; })
        .def("sent_chunks", &sent_chunks)
        .def("num_staged", &num_staged)
        .def("edges", &edges);
    m.class_<SparseCollectives>("SparseCollectives")
        .def(torch::init(&new_collectives))
        .def("plan", &cached_plan)
        .def("start_all_gather", &start_all_gather)
        .def("start_reduce_scatter", &start_reduce_scatter)
        .def("progress", &SparseCollectives::progress)
        .def("wait", &SparseCollectives::wait)
        .def("sent_bytes", [](const CollectivesPtr& self) { return self->sent_bytes(); })
        .def("arena_bytes", &SparseCollectives::arena_bytes)
        .def("num_plans", &SparseCollectives::num_plans);
}

}  // namespace
}  // namespace moetrain
