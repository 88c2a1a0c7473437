#include "comm/transfer/collectives.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/zeros.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Exception.h>

namespace moetrain::comm {
namespace {

const char* name_of(Collective collective) {
    return collective == Collective::kAllGather ? "all_gather" : "reduce_scatter";
}

size_t index_of(Buffer buffer) { return static_cast<size_t>(buffer); }

at::Tensor rows_of(const at::Tensor& flat, int64_t length, int64_t first, int64_t count) {
    return flat.narrow(0, first * length, count * length);
}

std::string text_of(const std::exception& error) {
    const auto* ours = dynamic_cast<const c10::Error*>(&error);
    return ours != nullptr ? ours->what_without_backtrace() : error.what();
}

}  // namespace

SparseCollectives::SparseCollectives(Site site)
    : site_(std::move(site)), plans_(site_.max_plans), sent_bytes_(site_.num_ranks, 0) {}

c10::intrusive_ptr<SparsePlan> SparseCollectives::plan(const PlacementArrays& placement, bool everywhere) {
    const std::lock_guard lock(mutex_);
    return plans_.find_or_make(placement, {site_.rank, site_.ranks_per_node, everywhere});
}

int64_t SparseCollectives::start(Collective collective, c10::intrusive_ptr<SparsePlan> plan, const at::Tensor& owned_CL,
                                 const at::Tensor& held_HL, const std::string& purpose) {
    const std::lock_guard lock(mutex_);
    require_whole();
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto transfer = make_transfer(collective, std::move(plan), owned_CL, held_HL, purpose);
    Transfer& queued = in_flight_.emplace_back(std::move(transfer));
    if (held_HL.is_cpu()) {
        start_here(queued);
    } else {
        queue_on_device(queued);
    }
    return queued.ticket;
}

SparseCollectives::Transfer SparseCollectives::make_transfer(Collective collective, c10::intrusive_ptr<SparsePlan> plan,
                                                             const at::Tensor& owned_CL, const at::Tensor& held_HL,
                                                             const std::string& purpose) {
    const int64_t length = held_HL.size(1);
    TabledProgram& tabled = plan->program(collective, owned_CL.scalar_type() != held_HL.scalar_type());
    const Program* program = &tabled.program();
    Transfer transfer{.ticket = next_ticket_++,
                      .collective = collective,
                      .purpose = purpose,
                      .plan = std::move(plan),
                      .program = program,
                      .tables = tabled.tables(length, held_HL.device()),
                      .buffers = {owned_CL.view({-1}), held_HL.view({-1}), {}, {}},
                      .posted = {},
                      .done = {}};
    return transfer;
}

// Every rank takes its turn, with staging or without, so that all finish the same collectives here.
void SparseCollectives::lend(Transfer& transfer, int64_t messages, int64_t work) {
    Arena& arena = arena_of(transfer.buffers[index_of(Buffer::kHeld)]);
    Arena::Half& half = arena.next();
    if (transfer.buffers[index_of(Buffer::kHeld)].is_cpu()) finish_through(half.ticket);
    half.ticket = transfer.ticket;
    const auto memory = arena.take(half, messages + work);
    transfer.buffers[index_of(Buffer::kMessages)] = memory.narrow(0, 0, messages);
    transfer.buffers[index_of(Buffer::kWork)] = memory.narrow(0, messages, work);
}

void SparseCollectives::start_here(Transfer& transfer) {
    const int64_t length = transfer.tables->length;
    lend(transfer, transfer.program->num_messages * length, transfer.program->num_work * length);
    for (int hop = 0; hop < kStages; ++hop)  // early, so that the second hop of others needs nothing more from here
        for (const Message& message : transfer.program->stages[hop].receives)
            post(transfer, hop, message, false);
    run_stage(transfer);
}

void SparseCollectives::queue_on_device(Transfer& transfer) {
    const at::Device device = transfer.tables->device;
    const c10::impl::VirtualGuardImpl streams(device.type());
    const c10::Stream callers = streams.getStream(device);
    if (!stream_) {
        open_communicator(device);
        stream_ = streams.getStreamFromGlobalPool(device);
    }
    const c10::StreamGuard guard(*stream_);
    c10::Event ready(device.type());
    ready.record(callers);
    ready.block(*stream_);
    const int64_t length = transfer.tables->length;
    lend(transfer, transfer.program->num_messages * length, transfer.program->num_work * length);
    while (transfer.next_stage < kStages)
        advance(transfer);
    wait_for_sends(transfer);
    transfer.done.emplace(device.type());
    transfer.done->record(*stream_);
}

// NCCL makes a communicator at the first call of a group's, which all ranks must then take part in.
void SparseCollectives::open_communicator(at::Device device) {
    if (site_.group == nullptr) return;
    std::vector<at::Tensor> one{at::zeros({1}, at::TensorOptions().device(device))};
    site_.group->allreduce(one)->wait();
}

// The copies and sums of the next stage, and what it sends.
void SparseCollectives::run_stage(Transfer& transfer) {
    const int hop = transfer.next_stage++;
    const Stage& stage = transfer.program->stages[hop];
    const StageTables& tables = transfer.tables->stages[hop];
    for (size_t i = 0; i < stage.copies.size(); ++i)
        site_.operators.copy(transfer.buffers[index_of(stage.copies[i].to)],
                             transfer.buffers[index_of(stage.copies[i].from)], tables.copies[i]);
    if (tables.sums.defined()) {
        std::vector<at::Tensor> sources;
        for (const Buffer buffer : sum_sources(stage.sums.to))
            sources.push_back(transfer.buffers[index_of(buffer)]);
        site_.operators.sum(transfer.buffers[index_of(stage.sums.to)], sources, tables.sums);
    }
    if (transfer.tables->device.is_cpu()) {
        for (const Message& message : stage.sends)
            post(transfer, hop, message, true);
    } else {
        post_group(transfer, hop);
    }
}

// What the stage before receives, then the next stage.
void SparseCollectives::advance(Transfer& transfer) {
    for (const Posted& posted : transfer.posted)
        if (posted.hop == transfer.next_stage - 1 && !posted.sends) wait_for(transfer, posted);
    run_stage(transfer);
}

void SparseCollectives::wait_for_sends(Transfer& transfer) {
    for (const Posted& posted : transfer.posted)
        if (posted.sends) wait_for(transfer, posted);
}

void SparseCollectives::finish(Transfer& transfer) {
    if (transfer.done) {
        const c10::impl::VirtualGuardImpl streams(transfer.tables->device.type());
        transfer.done->block(streams.getStream(transfer.tables->device));
        return;
    }
    while (transfer.next_stage < kStages)
        advance(transfer);
    wait_for_sends(transfer);
}

void SparseCollectives::finish_through(int64_t ticket) {
    while (!in_flight_.empty() && in_flight_.front().ticket <= ticket) {
        finish(in_flight_.front());
        in_flight_.pop_front();
    }
}

void SparseCollectives::progress(int64_t ticket) {
    const std::lock_guard lock(mutex_);
    require_whole();
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    for (Transfer& transfer : in_flight_)
        if (transfer.ticket <= ticket && transfer.next_stage == 1 && !transfer.program->stages[1].sends.empty())
            advance(transfer);
}

void SparseCollectives::wait(int64_t ticket) {
    const std::lock_guard lock(mutex_);
    require_whole();
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    finish_through(ticket);
}

// Tags are hops: those of a pair of ranks are sent, and received, in the order in which collectives were started.
void SparseCollectives::post(Transfer& transfer, int hop, const Message& message, bool sends) {
    std::vector<at::Tensor> tensors{
        rows_of(transfer.buffers[index_of(message.buffer)], transfer.tables->length, message.first, message.count)};
    Posted posted{nullptr, hop, sends, &message};
    try {
        posted.work =
            sends ? site_.group->send(tensors, message.peer, hop) : site_.group->recv(tensors, message.peer, hop);
    } catch (const std::exception& error) {
        fail(transfer, posted, text_of(error));
    }
    if (sends) sent_bytes_[message.peer] += static_cast<int64_t>(tensors[0].nbytes());
    transfer.posted.push_back(std::move(posted));
}

// All of a hop as one group where the backend has groups: NCCL moves them together, and ignores tags.
void SparseCollectives::post_group(Transfer& transfer, int hop) {
    const Stage& stage = transfer.program->stages[hop];
    if (stage.sends.empty() && stage.receives.empty()) return;
    const auto type = transfer.tables->device.type();
    const bool grouped = site_.group->getBackend(type)->supportsCoalescing();
    if (grouped) site_.group->startCoalescing(type);
    const size_t first = transfer.posted.size();
    for (const Message& message : stage.receives)
        post(transfer, hop, message, false);
    for (const Message& message : stage.sends)
        post(transfer, hop, message, true);
    if (!grouped) return;
    transfer.posted.resize(first);
    transfer.posted.push_back({site_.group->endCoalescing(type), hop, false, nullptr});
}

void SparseCollectives::wait_for(Transfer& transfer, const Posted& posted) {
    try {
        if (posted.work == nullptr || posted.work->wait()) return;
    } catch (const std::exception& error) {
        fail(transfer, posted, text_of(error));
    }
    fail(transfer, posted, "it was aborted");
}

void SparseCollectives::require_whole() const {
    TORCH_CHECK(failure_.empty(),
                "SparseCollectives: nothing more can be exchanged after an earlier failure; start all ranks again. "
                "The failure was: ",
                failure_);
}

void SparseCollectives::fail(const Transfer& transfer, const Posted& posted, const std::string& what) {
    std::string waits = "for its peers", cure = "look at what they report";
    if (posted.message != nullptr) {
        const auto& held = transfer.buffers[index_of(Buffer::kHeld)];
        const int64_t bytes = posted.message->count * transfer.tables->length * held.element_size();
        const std::string peer = "rank " + std::to_string(posted.message->peer);
        const std::string size =
            std::to_string(posted.message->count) + " chunk(s), " + std::to_string(bytes) + " bytes,";
        waits = posted.sends ? "for " + peer + " to take " + size : "for " + size + " from " + peer;
        cure = "look at what " + peer + " reports";
    }
    failure_ = c10::str("SparseCollectives.", name_of(transfer.collective), ": rank ", site_.rank, " of ",
                        site_.num_ranks, " waited in vain ", waits, " in hop ", posted.hop + 1, " of collective ",
                        transfer.ticket, " (", transfer.purpose, "): ", what);
    TORCH_CHECK(false, failure_, "; ", cure, ", and start all ranks again");
}

int64_t SparseCollectives::arena_bytes() const {
    int64_t total = 0;
    for (const auto& [key, arena] : arenas_)
        total += arena.num_bytes();
    return total;
}

Arena& SparseCollectives::arena_of(const at::Tensor& like) {
    const std::pair key(like.device().str(), like.scalar_type());
    return arenas_.try_emplace(key, like.options().requires_grad(false)).first->second;
}

}  // namespace moetrain::comm
