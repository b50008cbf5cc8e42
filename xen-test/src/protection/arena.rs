//! Three parties: two hosts, and a witness beside the client. Who runs the guest is read from the witness's record, from the frames that
//! leave the hosts, and from what the client hears.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use remusd::witness::{Record, RecordState};

use super::{PATIENCE, Protected, no_copy, protect, wait_epochs};
use crate::client::{Speakers, Turn};
use crate::host::{Host, Snapshot};
use crate::net::Party;
use crate::pair::Pair;
use crate::wait::wait_until;
use crate::witness::Etcd;

/// A guest protected with a witness.
pub struct Arena<'p> {
    pair: &'p Pair,
    /// Guest and client.
    pub protected: Protected<'p>,
    /// The witness.
    pub etcd: Etcd,
    speakers: Speakers,
}

impl<'p> Arena<'p> {
    /// A witness, and a guest protected with it, after a few armed epochs. From [`Snapshot::Armed`] they are those that are there.
    pub fn start(pair: &'p Pair, more: &str) -> Result<Self> {
        let there = more.is_empty() && pair.take_if(Snapshot::Armed);
        let (etcd, protected) = if there {
            (pair.take_witness().context("the snapshot's witness has been taken")?, Protected::of_snapshot(pair)?)
        } else {
            (Etcd::start(pair)?, Protected::make(pair)?)
        };
        let mac = protected.guest.mac();
        let speakers = pair.client_ns().call(move || Speakers::start(mac))??;
        if !there {
            protect(pair.a(), "guest", &format!("--witness {} {more}", Etcd::url()))?;
        }
        wait_epochs(pair.a(), "guest", 3)?;
        let arena = Self { pair, protected, etcd, speakers };
        let record = arena.record()?;
        ensure!(record.state == RecordState::Armed, "protected, but the witness says {record:?}");
        Ok(arena)
    }

    /// Everything it stands on.
    pub fn pair(&self) -> &'p Pair {
        self.pair
    }

    /// The record at the witness.
    pub fn record(&self) -> Result<Record> {
        let mut records = self.etcd.records()?;
        ensure!(records.len() == 1, "the witness has {} records: {records:?}", records.len());
        Ok(serde_json::from_value(records.remove(0))?)
    }

    /// Waits until the witness says that a host runs the guest, and says which.
    pub fn decided(&self) -> Result<Party> {
        let record = wait_until(PATIENCE, "the witness says who runs the guest", || {
            Ok(Some(self.record()?).filter(|r| r.state == RecordState::Active))
        })?;
        match record.owner.name.as_str() {
            "hosta" => Ok(Party::A),
            "hostb" => Ok(Party::B),
            other => anyhow::bail!("the witness names {other:?} as the owner"),
        }
    }

    /// The host that a party is.
    pub fn host(&self, party: Party) -> &'p Host {
        if party == Party::A { self.pair.a() } else { self.pair.b() }
    }

    /// Who spoke for the guest, in order. More turns than the guest has moved are two live copies.
    pub fn turns(&self) -> Result<Vec<Turn>> {
        self.speakers.turns()
    }

    /// Fails unless the guest has spoken from exactly these hosts in this order and the client has missed nothing.
    pub fn spoke_from(&self, hosts: &[Party]) -> Result<()> {
        self.protected.goes_on()?;
        let turns = self.turns()?;
        let spoke: Vec<Party> = turns.iter().map(|turn| turn.host).collect();
        ensure!(spoke == hosts, "the guest spoke from {spoke:?} and not from {hosts:?}: {turns:?}");
        Ok(())
    }

    /// As [`Arena::spoke_from`], and the host that does not run the guest holds no copy once everything is joined.
    pub fn ended_as(&self, hosts: &[Party]) -> Result<()> {
        self.spoke_from(hosts)?;
        let last = *hosts.last().context("it runs somewhere")?;
        let other = if last == Party::A { Party::B } else { Party::A };
        if self.host(other).run("true").is_ok() {
            no_copy(self.host(other), "guest")?;
        }
        Ok(())
    }

    /// Fails if the guest speaks, from any host, within this time.
    pub fn silent_for(&self, time: Duration) -> Result<()> {
        let from = std::time::Instant::now();
        let heard = self.protected.client.first_after(from, time);
        ensure!(heard.is_none(), "the guest was heard although nobody may run it: {heard:?}");
        Ok(())
    }
}
