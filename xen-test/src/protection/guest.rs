//! A test guest as a scenario uses it.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use xen_test_guest::protocol::{DirtySpec, Hello, Ports, Rate};
use xen_test_guest::xl::{GuestSpec, Kind};

use super::{PATIENCE, at};
use crate::client::{Control, CounterClient};
use crate::host::{Host, Snapshot};
use crate::pair::Pair;

/// A running test guest, reached over the network from the client's namespace.
pub struct Guest<'p> {
    /// What it was made of.
    pub spec: GuestSpec,
    /// Who it is: another boot would say something else.
    pub hello: Hello,
    pair: &'p Pair,
    ports: Ports,
}

impl<'p> Guest<'p> {
    /// Creates the guest on a host and waits until its servers answer.
    ///
    /// If the pair was reset to a running guest of this kind, it is that one.
    pub fn create(pair: &'p Pair, host: &Host, spec: GuestSpec) -> Result<Self> {
        match pair.take() {
            Some(Snapshot::Guest) if host.name() == "a" && spec == GuestSpec::new(Kind::Pvh) => {
                return Self::meet(pair, spec);
            }
            None | Some(Snapshot::Ready) => {}
            Some(other) => bail!(
                "the pair was reset to '{}', which has a guest that is not the one wanted: the scenario has to start from 'ready'",
                other.name()
            ),
        }
        host.sh(&spec.create_command())?;
        Self::meet(pair, spec)
    }

    /// The guest that the snapshots have.
    pub fn of_snapshot(pair: &'p Pair) -> Result<Self> {
        Self::meet(pair, GuestSpec::new(Kind::Pvh))
    }

    /// A guest that somebody has created: waits until its servers answer.
    pub fn meet(pair: &'p Pair, spec: GuestSpec) -> Result<Self> {
        let ports = Ports::default();
        let control = Control::new(at(spec.ip, ports.control), PATIENCE);
        let hello = pair
            .client_ns()
            .spawn(move || control.wait_ready(PATIENCE))?
            .join()
            .map_err(|_| anyhow::anyhow!("the client's thread panicked"))??
            .with_context(|| format!("guest {} does not answer", spec.name))?;
        Ok(Self { spec, hello, pair, ports })
    }

    /// Its ports.
    #[must_use]
    pub fn ports(&self) -> &Ports {
        &self.ports
    }

    /// A connection that counts.
    pub fn counter(&self, hz: f64) -> Result<CounterClient> {
        let to = at(self.spec.ip, self.ports.counter);
        Ok(self.pair.client_ns().call(move || CounterClient::connect(to, Rate { hz, payload: 0 }, PATIENCE))??)
    }

    /// Calls the guest's control port.
    pub fn ask<T: Send + 'static>(
        &self,
        call: impl FnOnce(&Control) -> Result<T, crate::client::ControlError> + Send + 'static,
    ) -> Result<T> {
        self.ask_within(PATIENCE, call)
    }

    /// As [`Guest::ask`], with another patience: an answer may be held for ever with the guest that gives it.
    pub fn ask_within<T: Send + 'static>(
        &self,
        patience: Duration,
        call: impl FnOnce(&Control) -> Result<T, crate::client::ControlError> + Send + 'static,
    ) -> Result<T> {
        let control = Control::new(at(self.spec.ip, self.ports.control), patience);
        let answer = self
            .pair
            .client_ns()
            .spawn(move || call(&control))?
            .join()
            .map_err(|_| anyhow::anyhow!("the client's thread panicked"))??;
        answer.with_context(|| format!("control port of guest {}", self.spec.name))
    }

    /// Has it write to its memory.
    pub fn dirty(&self, pages_per_sec: u64, bytes_per_page: usize, mem_mb: usize) -> Result<()> {
        let order = xen_test_guest::protocol::Order::Rand;
        self.ask(move |c| c.dirty(DirtySpec { pages_per_sec, bytes_per_page, order, mem_mb })).map(drop)
    }

    /// Has it check its memory pattern.
    pub fn verify(&self) -> Result<()> {
        let verdict = self.ask(Control::verify)?;
        ensure!(
            verdict.bad_pages == 0 && verdict.pages > 0,
            "the memory pattern of guest {} is broken: {} of {} pages, first {:?}",
            self.spec.name,
            verdict.bad_pages,
            verdict.pages,
            verdict.bad.first()
        );
        Ok(())
    }

    /// Fails unless the guest that answers is the one that was created, not a new boot.
    pub fn is_the_same(&self) -> Result<()> {
        let now = self.ask(Control::hello)?;
        ensure!(now.id == self.hello.id, "guest {} has been booted anew", self.spec.name);
        Ok(())
    }

    /// Its vif's hardware address.
    #[must_use]
    pub fn mac(&self) -> crate::client::Mac {
        crate::client::Mac(self.spec.mac)
    }

    /// Its IPv4 and IPv6 addresses.
    #[must_use]
    pub fn addresses(&self) -> [IpAddr; 2] {
        [self.spec.ip.into(), self.spec.ip6().into()]
    }
}
