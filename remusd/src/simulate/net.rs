//! Connections between the two hosts: bytes in order, late, held up by a cut, or gone with a reset. What TCP promises and nothing more.

use std::collections::VecDeque;

use super::plan::{HostIx, MS, Micros};
use super::world::{Event, Input, World};

/// A connection's number.
pub type ConnId = usize;

/// What travels.
#[derive(Clone, Debug)]
pub enum Parcel {
    /// Bytes of whole frames.
    Bytes(Vec<u8>),
    /// The other end was closed in order.
    End,
    /// The other end is not there any more.
    Reset,
}

/// One end.
#[derive(Clone, Copy, Debug)]
pub struct End {
    /// Where.
    pub host: HostIx,
    /// Which daemon holds it; `None` until the other side's kernel has found one.
    pub incarnation: Option<u32>,
    /// Nobody has closed it.
    pub open: bool,
}

/// A connection. End 0 has opened it.
#[derive(Debug)]
pub struct Conn {
    /// Its ends.
    pub ends: [End; 2],
    /// What is on its way to each end, with how much of it has its arrival put off by a cut.
    pipes: [(VecDeque<Parcel>, Micros, u32); 2],
    /// What end 1 has sent, kept to be sent into another connection by [`super::plan::What::Crossed`].
    pub said: Option<Vec<u8>>,
}

/// Typical time from host to host.
const LATENCY: Micros = 300;

impl World {
    /// Opens a connection to the other host. It is not known yet whether anybody is there.
    pub fn connect(&mut self, host: HostIx) -> ConnId {
        let end = |host, incarnation| End { host, incarnation, open: true };
        let ours = self.hosts[host].incarnation;
        self.conns.push(Conn {
            ends: [end(host, Some(ours)), end(1 - host, None)],
            pipes: Default::default(),
            said: None,
        });
        self.conns.len() - 1
    }

    /// Sends from this end.
    pub fn net_send(&mut self, conn: ConnId, end: usize, parcel: Parcel) {
        if let (1, Parcel::Bytes(bytes)) = (end, &parcel) {
            self.conns[conn].said = Some(bytes.clone());
        }
        let latency = self.takes(LATENCY);
        let now = self.now;
        let (queue, last, _) = &mut self.conns[conn].pipes[1 - end];
        queue.push_back(parcel);
        let at = (*last).max(now + latency);
        *last = at;
        self.at(at, Event::Net(conn, 1 - end));
    }

    /// Closes this end; what was sent before arrives.
    pub fn net_close(&mut self, conn: ConnId, end: usize) {
        if std::mem::replace(&mut self.conns[conn].ends[end].open, false) {
            self.net_send(conn, end, Parcel::End);
        }
    }

    pub(super) fn net_arrive(&mut self, conn: ConnId, to: usize) {
        let End { host, incarnation, open } = self.conns[conn].ends[to];
        if self.cut[1 - host] > 0 {
            self.conns[conn].pipes[to].2 += 1;
            return;
        }
        let here = &self.hosts[host];
        if !here.up || here.frozen > self.now {
            // A host without power hears nothing; a frozen one later.
            let until = here.frozen;
            if here.up {
                self.at(until, Event::Net(conn, to));
            } else {
                self.conns[conn].pipes[to].0.pop_front();
            }
            return;
        }
        let alive = here.daemon.is_some() && incarnation.is_none_or(|i| i == here.incarnation) && open;
        if !alive {
            let parcel = self.conns[conn].pipes[to].0.pop_front();
            if matches!(parcel, Some(Parcel::Bytes(_))) && open {
                self.conns[conn].ends[to].open = false;
                self.net_send(conn, to, Parcel::Reset);
            }
            return;
        }
        if let Some(until) = self.still_until(host) {
            self.at(until, Event::Net(conn, to));
            return;
        }
        let incarnation = self.hosts[host].incarnation;
        self.conns[conn].ends[to].incarnation = Some(incarnation);
        let Some(parcel) = self.conns[conn].pipes[to].0.pop_front() else { return };
        if !matches!(parcel, Parcel::Bytes(_)) {
            self.conns[conn].ends[to].open = false;
        }
        self.net_deliver(host, conn, to, parcel);
    }

    /// The kernel of this host closes what its daemon had open.
    pub(super) fn close_all_of(&mut self, host: HostIx) {
        let incarnation = self.hosts[host].incarnation;
        for conn in 0..self.conns.len() {
            for end in 0..2 {
                let this = self.conns[conn].ends[end];
                if this.host == host && this.incarnation == Some(incarnation) {
                    self.net_close(conn, end);
                }
            }
        }
    }

    /// After a power loss nobody knows the host's old connections any more: whoever still has one is told.
    pub(super) fn forget_all_of(&mut self, host: HostIx) {
        for conn in 0..self.conns.len() {
            for end in 0..2 {
                let this = self.conns[conn].ends[end];
                if this.host == host && this.open && this.incarnation.is_some() {
                    self.conns[conn].ends[end].open = false;
                    self.net_send(conn, end, Parcel::Reset);
                }
            }
        }
    }

    pub(super) fn cut_off(&mut self, from: HostIx, time: Micros) {
        self.cut[from] += 1;
        self.after(time, Event::Heal(from));
    }

    pub(super) fn heal(&mut self, from: HostIx) {
        self.cut[from] -= 1;
        if self.cut[from] > 0 {
            return;
        }
        self.lines_heal(from);
        for conn in 0..self.conns.len() {
            for to in 0..2 {
                if self.conns[conn].ends[to].host == from {
                    continue;
                }
                let held = std::mem::take(&mut self.conns[conn].pipes[to].2);
                if held > 0 {
                    let wait = self.takes(MS);
                    let at = (self.now + wait).max(self.conns[conn].pipes[to].1);
                    self.conns[conn].pipes[to].1 = at;
                    for _ in 0..held {
                        self.at(at, Event::Net(conn, to));
                    }
                }
            }
        }
    }

    /// Something between the hosts resets every connection.
    pub(super) fn reset_all(&mut self) {
        for conn in 0..self.conns.len() {
            if self.conns[conn].ends.iter().all(|end| end.open) {
                for to in 0..2 {
                    self.conns[conn].pipes[to].0.clear();
                    self.conns[conn].pipes[to].0.push_back(Parcel::Reset);
                    self.at(self.now, Event::Net(conn, to));
                }
            }
        }
    }

    /// The last that an older connection's backup has said arrives in the newest one.
    pub(super) fn cross(&mut self) {
        let open = |conn: &&Conn| conn.ends.iter().all(|end| end.open && end.incarnation.is_some());
        let Some(newest) = self.conns.iter().rposition(|conn| open(&conn)) else { return };
        let Some(bytes) = self.conns[..newest].iter().rev().find_map(|conn| conn.said.clone()) else { return };
        self.net_send(newest, 1, Parcel::Bytes(bytes));
    }

    pub(super) fn input(&mut self, host: HostIx, input: Input) {
        match input {
            Input::Start => self.daemon_ready(host),
            Input::LinkTick(conn) => self.link_tick(host, conn),
            Input::LinkWrite(conn) => self.link_write(host, conn),
            Input::PrimaryDone(_)
            | Input::PrimaryTimer(..)
            | Input::Engine(..)
            | Input::SuspendOver(_)
            | Input::LookAtGuest => self.primary_input(host, input),
            Input::Backup(done, number) => self.backup_input(host, done, number),
            Input::Recovery(done, number) => self.recovery_input(host, done, number),
            Input::Patience(conn) => self.out_of_patience(host, conn),
            Input::Unanswered => self.continue_accepting(host),
            Input::Accepted(conn) => self.accepted(host, conn),
            Input::Keeper(..) | Input::KeeperRetry(..) | Input::KeeperLimit(..) => self.keeper_input(host, input),
            Input::Probe => self.probe(host),
            Input::DiskNews(..) => self.primary_input(host, input),
            Input::DiskActivated(session, done) => self.disk_activated(host, session, done),
        }
    }
}
