//! Figures for a monitoring system, in the OpenMetrics text format (github.com/prometheus/OpenMetrics, 1.0), and the small server that
//! gives them away (`server`). docs/monitoring.md says what each means.
//!
//! What stands is read when it is asked for; what flows (epochs, events) is counted as it happens.

pub mod server;

#[cfg(test)]
mod tests;

use std::collections::HashSet;
use std::sync::atomic::AtomicU64;
use std::sync::{Mutex, PoisonError};

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};

use crate::api::{MayRun, Role, StatusRow};
use crate::ops::EventKind;
use crate::protect::report::EpochReport;

/// A protection as one of the two hosts has it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Side {
    domain: String,
    role: &'static str,
    peer: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct InState {
    domain: String,
    role: &'static str,
    state: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Runs {
    domain: String,
    role: &'static str,
    who: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfDomain {
    domain: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfWitness {
    witness: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfKind {
    kind: &'static str,
}

type Whole<L> = Family<L, Gauge>;
type Fraction<L> = Family<L, Gauge<f64, AtomicU64>>;
type Durations = Family<OfDomain, Histogram, fn() -> Histogram>;

/// What is not counted as it happens: how it stands at the moment of the question.
#[derive(Clone, Debug, Default)]
pub struct Now {
    /// Every protection.
    pub rows: Vec<StatusRow>,
    /// Of protections of this host's guests: pages and bytes sent since they began, by domain name.
    pub sent: Vec<(String, u64, u64)>,
    /// The witnesses that are asked, and whether they answer; `None` is not known yet.
    pub witnesses: Vec<(String, Option<bool>)>,
    /// Guests that run here and have a policy.
    pub wanted: Vec<String>,
}

/// All of this daemon's figures.
pub struct Metrics {
    registry: Mutex<Registry>,
    protected: Whole<Side>,
    state: Whole<InState>,
    may_run: Whole<Runs>,
    generation: Whole<Side>,
    acked_epoch: Whole<Side>,
    acked_age: Fraction<Side>,
    stale: Fraction<Side>,
    held_packets: Whole<OfDomain>,
    held_bytes: Whole<OfDomain>,
    dropped_packets: Family<OfDomain, Counter>,
    sent_pages: Family<OfDomain, Counter>,
    sent_bytes: Family<OfDomain, Counter>,
    wanted: Whole<OfDomain>,
    witness_up: Whole<OfWitness>,
    epochs: Family<OfDomain, Counter>,
    pause: Durations,
    suspend: Durations,
    acknowledge: Durations,
    held_for: Durations,
    epoch_bytes: Durations,
    events: Family<OfKind, Counter>,
    /// Domains of which epochs were counted.
    counted: Mutex<HashSet<String>>,
}

/// 100 µs to 6.6 s, each twice the one before: pauses and acknowledgements lie in the middle.
fn seconds() -> Histogram {
    Histogram::new((0..17).map(|step| 0.0001 * 2_f64.powi(step)))
}

/// 4 KiB to 1 GiB.
fn bytes() -> Histogram {
    Histogram::new((0..10).map(|step| 4096.0 * 4_f64.powi(step)))
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// Nothing was counted yet.
    #[must_use]
    pub fn new() -> Self {
        let durations = |make: fn() -> Histogram| Durations::new_with_constructor(make);
        let metrics = Self {
            registry: Mutex::new(Registry::with_prefix("remus")),
            protected: Family::default(),
            state: Family::default(),
            may_run: Family::default(),
            generation: Family::default(),
            acked_epoch: Family::default(),
            acked_age: Family::default(),
            stale: Family::default(),
            held_packets: Family::default(),
            held_bytes: Family::default(),
            dropped_packets: Family::default(),
            sent_pages: Family::default(),
            sent_bytes: Family::default(),
            wanted: Family::default(),
            witness_up: Family::default(),
            epochs: Family::default(),
            pause: durations(seconds),
            suspend: durations(seconds),
            acknowledge: durations(seconds),
            held_for: durations(seconds),
            epoch_bytes: durations(bytes),
            events: Family::default(),
            counted: Mutex::default(),
        };
        metrics.register();
        metrics
    }

    fn register(&self) {
        let mut registry = self.registry.lock().unwrap_or_else(PoisonError::into_inner);
        let r = &mut *registry;
        let version = Info::new([("version", env!("CARGO_PKG_VERSION"))]);
        r.register("build", "Which remusd this is", version);
        r.register(
            "protected",
            "Primary: 1 if the loss of this host would be survived now. Backup: 1 if the copy can be activated",
            self.protected.clone(),
        );
        r.register("state", "1 for the state that the protection is in", self.state.clone());
        r.register("may_run", "1 for who may run the guest: here, peer, undecided, nobody", self.may_run.clone());
        r.register("generation", "Session number of the protection", self.generation.clone());
        r.register("acked_epoch", "Newest acknowledged epoch", self.acked_epoch.clone());
        let age = "Since the newest acknowledgement";
        r.register_with_unit("acked_age", age, Unit::Seconds, self.acked_age.clone());
        let stale =
            "Age of the state that the copy has: what would be lost if the primary died now; none if all would be";
        r.register_with_unit("stale", stale, Unit::Seconds, self.stale.clone());
        r.register("held_packets", "Output held now", self.held_packets.clone());
        r.register_with_unit("held", "Output held now", Unit::Bytes, self.held_bytes.clone());
        let dropped = "Output lost to the buffer's limit or resets since protection began";
        r.register("dropped_packets", dropped, self.dropped_packets.clone());
        r.register("sent_pages", "Pages sent since protection began", self.sent_pages.clone());
        r.register_with_unit("sent", "Sent since protection began", Unit::Bytes, self.sent_bytes.clone());
        r.register(
            "wanted",
            "1 for a guest that runs here and has a policy: it is to be protected",
            self.wanted.clone(),
        );
        r.register("witness_up", "1 if the witness answers", self.witness_up.clone());
        r.register("epochs", "Epochs finished", self.epochs.clone());
        let pause = "How long the guest stood still for an epoch";
        r.register_with_unit("epoch_pause", pause, Unit::Seconds, self.pause.clone());
        let suspend = "From the suspend request to the guest standing still";
        r.register_with_unit("epoch_suspend", suspend, Unit::Seconds, self.suspend.clone());
        let acknowledge = "From the last byte of an epoch sent to its acknowledgement";
        r.register_with_unit("epoch_ack", acknowledge, Unit::Seconds, self.acknowledge.clone());
        let held = "How long output of an epoch was held after its end";
        r.register_with_unit("epoch_output_held", held, Unit::Seconds, self.held_for.clone());
        r.register_with_unit("epoch", "Size of an epoch on the wire", Unit::Bytes, self.epoch_bytes.clone());
        r.register("events", "Events, as `remus events` shows them", self.events.clone());
        for kind in EventKind::ALL {
            // From the start, so that the first one is an increase.
            drop(self.events.get_or_create(&OfKind { kind: kind.name() }));
        }
    }

    /// Counts an epoch that has ended.
    pub fn epoch(&self, domain: &str, report: &EpochReport) {
        let of = OfDomain { domain: domain.to_owned() };
        self.counted.lock().unwrap_or_else(PoisonError::into_inner).insert(domain.to_owned());
        let seconds = |us: u64| us as f64 / 1e6;
        self.epochs.get_or_create(&of).inc();
        self.pause.get_or_create(&of).observe(seconds(report.paused_us()));
        self.suspend.get_or_create(&of).observe(seconds(report.suspend_us));
        self.acknowledge.get_or_create(&of).observe(seconds(report.ack_us));
        if report.armed {
            let held = report.paused_us() + report.send_us + report.ack_us + report.commit_us;
            self.held_for.get_or_create(&of).observe(seconds(held));
        }
        self.epoch_bytes.get_or_create(&of).observe(report.bytes as f64);
    }

    /// Counts an event.
    pub fn event(&self, kind: EventKind) {
        self.events.get_or_create(&OfKind { kind: kind.name() }).inc();
    }

    /// All figures as OpenMetrics text.
    #[must_use]
    pub fn text(&self, now: &Now) -> String {
        // One question at a time: what stands is written down anew for each.
        let registry = self.registry.lock().unwrap_or_else(PoisonError::into_inner);
        self.stand(now);
        let mut text = String::new();
        // Only a full memory could fail, and that does not return.
        let _ = encode(&mut text, &registry);
        text
    }

    fn stand(&self, now: &Now) {
        self.clear();
        for row in &now.rows {
            self.row(row);
        }
        for (domain, pages, bytes) in &now.sent {
            let of = OfDomain { domain: domain.clone() };
            self.sent_pages.get_or_create(&of).inc_by(*pages);
            self.sent_bytes.get_or_create(&of).inc_by(*bytes);
        }
        for domain in &now.wanted {
            self.wanted.get_or_create(&OfDomain { domain: domain.clone() }).set(1);
        }
        for (witness, up) in &now.witnesses {
            if let Some(up) = up {
                self.witness_up.get_or_create(&OfWitness { witness: witness.clone() }).set(i64::from(*up));
            }
        }
        // Domains that are gone for good would stay for ever.
        let mut counted = self.counted.lock().unwrap_or_else(PoisonError::into_inner);
        counted.retain(|domain| {
            let known = now.rows.iter().any(|row| row.domain == *domain);
            if !known {
                let of = OfDomain { domain: domain.clone() };
                self.epochs.remove(&of);
                for family in [&self.pause, &self.suspend, &self.acknowledge, &self.held_for, &self.epoch_bytes] {
                    family.remove(&of);
                }
            }
            known
        });
    }

    fn clear(&self) {
        for family in [&self.protected, &self.generation, &self.acked_epoch] {
            family.clear();
        }
        for family in [&self.acked_age, &self.stale] {
            family.clear();
        }
        for family in [&self.held_packets, &self.held_bytes, &self.wanted] {
            family.clear();
        }
        for family in [&self.dropped_packets, &self.sent_pages, &self.sent_bytes] {
            family.clear();
        }
        self.state.clear();
        self.may_run.clear();
        self.witness_up.clear();
    }

    fn row(&self, row: &StatusRow) {
        let role = match row.role {
            Role::Primary => "primary",
            Role::Backup => "backup",
        };
        let side = Side { domain: row.domain.clone(), role, peer: row.peer.clone() };
        let whole = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        self.protected.get_or_create(&side).set(i64::from(row.protected));
        self.state.get_or_create(&InState { domain: row.domain.clone(), role, state: row.state.clone() }).set(1);
        let who = match row.may_run {
            MayRun::Here => "here",
            MayRun::Peer => "peer",
            MayRun::Undecided => "undecided",
            MayRun::Nobody => "nobody",
        };
        self.may_run.get_or_create(&Runs { domain: row.domain.clone(), role, who }).set(1);
        self.generation.get_or_create(&side).set(whole(row.generation.0));
        if let Some(epoch) = row.acked {
            self.acked_epoch.get_or_create(&side).set(whole(epoch.0));
        }
        let seconds = |ms: u64| ms as f64 / 1e3;
        if let Some(age) = row.acked_age_ms {
            self.acked_age.get_or_create(&side).set(seconds(age));
        }
        if let Some(stale) = row.stale_ms {
            self.stale.get_or_create(&side).set(seconds(stale));
        }
        if row.role == Role::Primary {
            let of = OfDomain { domain: row.domain.clone() };
            self.held_packets.get_or_create(&of).set(whole(row.held_packets));
            self.held_bytes.get_or_create(&of).set(whole(row.held_bytes));
            self.dropped_packets.get_or_create(&of).inc_by(row.dropped_packets);
        }
    }
}
