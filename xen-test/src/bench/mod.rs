//! The benchmark against stock `xl remus`: same host, same guest, same load, same interval, one run after another.
//!
//! What the guest feels is measured inside the guest by the TSC, for all alike. Everything is emulated: only ratios within one run say
//! anything.

mod goals;
mod measure;
mod plot;
mod subject;
mod table;

use std::time::Duration;

use anyhow::Result;
use serde::Serialize;
use xen_test_guest::protocol::{DirtySpec, Order};
use xen_test_guest::xl::{GuestSpec, Kind};

pub use goals::{Goal, goals};
pub use measure::{Epochs, Row};
pub use plot::plots;
pub use subject::{Subject, Way};
pub use table::table;

use crate::pair::Pair;
use crate::progress;
use crate::protection::{Guest, start_daemons};

/// Memory of the guest, in MiB: room for the largest load.
const GUEST_MB: u32 = 192;

/// What the guest does while it is measured.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Load {
    /// About so many pages are written in an epoch; 0: the guest is idle.
    pub pages_per_epoch: u64,
    /// From an epoch's end to the next suspend, in milliseconds. Stretched where log-dirty faults, emulated, limit the rate.
    pub interval_ms: u64,
    /// Bytes that change in each page.
    pub bytes_per_page: usize,
    /// In which order.
    pub order: Order,
}

impl Load {
    const fn new(pages_per_epoch: u64, interval_ms: u64, bytes_per_page: usize, order: Order) -> Self {
        Self { pages_per_epoch, interval_ms, bytes_per_page, order }
    }

    /// The dirtier's orders; an epoch is a bit longer than its interval.
    fn spec(self) -> DirtySpec {
        DirtySpec {
            pages_per_sec: self.pages_per_epoch * 1000 / (self.interval_ms + 100),
            bytes_per_page: self.bytes_per_page,
            order: self.order,
            // Random writes hit some pages twice: twice the room makes that rare.
            mem_mb: usize::try_from(self.pages_per_epoch * 2 / 256).unwrap_or(0).clamp(8, 90),
        }
    }
}

/// What to run.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Loads on one host, into nothing.
    pub local: Vec<Load>,
    /// Loads between two hosts over ssh.
    pub pair: Vec<Load>,
    /// Loads between two hosts over ssh under which round trips are compared, output being held.
    pub trips: Vec<Load>,
    /// How long each is watched.
    pub watch: Duration,
}

impl Plan {
    /// One row for each goal: about half an hour.
    #[must_use]
    pub fn quick() -> Self {
        Self {
            local: vec![
                Load::new(0, 1, 16, Order::Rand),
                Load::new(4000, 500, 16, Order::Rand),
                Load::new(20_000, 3000, 16, Order::Rand),
            ],
            pair: [16, 4096].map(|bytes| Load::new(4000, 500, bytes, Order::Rand)).to_vec(),
            trips: trips(),
            watch: Duration::from_secs(15),
        }
    }

    /// Everything.
    #[must_use]
    pub fn full() -> Self {
        let mut local = vec![Load::new(0, 1, 16, Order::Rand)];
        for (pages, interval) in [(500, 200), (4000, 500), (5000, 700), (20_000, 3000)] {
            for order in [Order::Seq, Order::Rand] {
                for bytes in [16, 512, 4096] {
                    local.push(Load::new(pages, interval, bytes, order));
                }
            }
        }
        let pair = [16, 512, 4096].map(|bytes| Load::new(4000, 500, bytes, Order::Rand)).to_vec();
        Self { local, pair, trips: trips(), watch: Duration::from_secs(30) }
    }

    /// Hosts that it needs.
    #[must_use]
    pub fn hosts(&self) -> usize {
        if self.pair.is_empty() && self.trips.is_empty() { 1 } else { 2 }
    }
}

/// Idle, and a few pages at stock's interval.
fn trips() -> Vec<Load> {
    [0, 500].map(|pages| Load::new(pages, goals::STOCK_INTERVAL_MS, 16, Order::Rand)).to_vec()
}

/// The whole outcome.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Every measurement.
    pub rows: Vec<Row>,
    /// What was to be reached, and whether it was.
    pub goals: Vec<Goal>,
    /// Why there are no more rows, if there should be.
    pub incomplete: Option<String>,
}

/// Runs the plan on booted hosts with the project's programs. Ends with the first row that cannot be measured; those before it count.
pub fn bench(pair: &Pair, plan: &Plan) -> Report {
    let mut rows = Vec::new();
    let incomplete = measure_all(pair, plan, &mut rows).err().map(|error| format!("{error:#}"));
    Report { goals: goals(&rows), rows, incomplete }
}

fn measure_all(pair: &Pair, plan: &Plan, rows: &mut Vec<Row>) -> Result<()> {
    start_daemons(pair)?;
    let spec = GuestSpec { memory_mb: GUEST_MB, ..GuestSpec::new(Kind::Pvh) };
    let guest = Guest::create(pair, pair.a(), spec)?;
    for (loads, way) in [(&plan.local, Way::Blackhole), (&plan.pair, Way::Ssh)] {
        for load in loads {
            for subject in [Subject::Unprotected, Subject::Stock, Subject::SaveHelper, Subject::Native] {
                let row = measure::row(pair, &guest, subject, way, *load, plan.watch)?;
                progress!("bench: {row}");
                rows.push(row);
            }
        }
    }
    for load in &plan.trips {
        for subject in [Subject::Unprotected, Subject::Held, Subject::Auto] {
            let row = measure::row(pair, &guest, subject, Way::Ssh, *load, plan.watch)?;
            progress!("bench: {row}");
            rows.push(row);
        }
    }
    guest.verify()
}
