//! One interface of a guest and the queue in front of it.

use std::sync::{Arc, Mutex};

use netlink_packet_route::tc::TcHandle;

use crate::device::DeviceStats;
use crate::output::OutputTeller;

use super::conn::Conn;
use super::error::NetError;
use super::event::NetEvent;
use super::messages::{PACKET_COST, plug_handle};
use super::ops::On;
use super::plug_model::PlugOp;
use super::plug_state::{Outcome, PlugState};
use super::tap::Tap;
use super::watch::Notice;
use super::wire::Link;

/// The handle of a lane's first plug. Any number does; these look like nobody else's in `tc qdisc show`.
const FIRST_MAJOR: u16 = 0x5200;

/// What a lane is made from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct LaneSpec {
    /// The guest's interface.
    pub vif: String,
    /// The intermediate device to make for it.
    pub ifb: String,
    /// The most that may be held, in bytes.
    pub limit: u32,
    /// Whether a script has made the intermediate device: it leads there already, and the device stays at the end.
    pub scripted: bool,
    /// Whether the interface may be missing: the tap of an emulated card goes when the guest unplugs the card.
    pub optional: bool,
}

/// A guest's interface, its intermediate device, and the order of requests to the plug there.
pub(super) struct Lane {
    spec: LaneSpec,
    /// `None` when it is optional and not there, or gone.
    vif_index: Option<u32>,
    ifb: Link,
    ifb_gone: bool,
    major: u16,
    state: PlugState,
    stats: Arc<Mutex<DeviceStats>>,
    /// Who is told that output is held, if anybody wants to know.
    output: Option<OutputTeller>,
    /// While armed, if somebody wants to know.
    tap: Option<Tap>,
    /// Dropped packets of qdiscs that were replaced.
    drops_before: u64,
    drops_told: u64,
}

impl Lane {
    /// Makes the intermediate device with a closed plug and the ingress qdisc. Output does not go there yet.
    pub(super) fn setup(
        conn: &mut Conn,
        spec: LaneSpec,
        stats: Arc<Mutex<DeviceStats>>,
        output: Option<OutputTeller>,
    ) -> Result<Self, NetError> {
        let vif = conn.link(&spec.vif)?;
        if vif.is_none() && !spec.optional {
            return Err(NetError::NoLink(spec.vif));
        }
        let made = match spec.scripted {
            true => {
                conn.link(&spec.ifb)?.filter(|l| l.kind == "ifb").ok_or_else(|| NetError::NotIfb(spec.ifb.clone()))?
            }
            false => conn.create_ifb(&spec.ifb)?,
        };
        // The device would send router solicitations and the like of its own through the queue. Where IPv6 is
        // off there is nothing to turn off.
        let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{}/disable_ipv6", spec.ifb), "1");
        let on = On { name: &spec.ifb, index: made.index };
        conn.put_plug(on, FIRST_MAJOR, spec.limit)?;
        if spec.scripted {
            // Output goes there already and flows until it is armed.
            conn.change_plug(on, plug_handle(FIRST_MAJOR), PlugOp::ReleaseIndefinite)?;
        }
        conn.set_up(on)?;
        let ifb = conn.link(&spec.ifb)?.ok_or_else(|| NetError::NoLink(spec.ifb.clone()))?;
        if let Some(vif) = &vif {
            conn.ensure_ingress(On { name: &spec.vif, index: vif.index })?;
        }
        Ok(Self {
            vif_index: vif.map(|v| v.index),
            ifb,
            ifb_gone: false,
            major: FIRST_MAJOR,
            state: PlugState::default(),
            stats,
            output,
            tap: None,
            drops_before: 0,
            drops_told: 0,
            spec,
        })
    }

    fn vif(&self) -> Option<On<'_>> {
        self.vif_index.map(|index| On { name: &self.spec.vif, index })
    }

    fn ifb(&self) -> On<'_> {
        On { name: &self.spec.ifb, index: self.ifb.index }
    }

    pub(super) fn is_armed(&self) -> bool {
        self.state.is_armed()
    }

    /// From here on output is held. Doing it twice is fine.
    pub(super) fn arm(&mut self, conn: &mut Conn) -> Result<(), NetError> {
        if self.state.is_armed() {
            return Ok(());
        }
        if self.spec.scripted {
            // A plug that has been open counts its packets wrong from then on (hazard F14).
            self.put_next_plug(conn)?;
        }
        if let Some(output) = self.output.clone().filter(|_| self.vif_index.is_some()) {
            let failed = |cause| NetError::Tap { vif: self.spec.vif.clone(), cause };
            self.tap = Some(Tap::open(&self.spec.vif, output).map_err(failed)?);
        }
        if let Some(vif) = self.vif() {
            conn.add_redirect(vif, self.ifb.index)?;
        }
        self.state.arm()?;
        Ok(())
    }

    /// Closes `epoch`.
    pub(super) fn close(&mut self, conn: &mut Conn, epoch: u64) -> Result<(), NetError> {
        let op = self.state.close(epoch)?;
        if let Some(tap) = &self.tap {
            // Before the queue is closed: what comes behind the close must be told.
            tap.empty();
        }
        match op {
            Some(op) => self.send(conn, op),
            None => Ok(()),
        }
    }

    /// Releases `epoch`.
    pub(super) fn release(&mut self, conn: &mut Conn, epoch: u64) -> Result<(), NetError> {
        let op = self.state.release(epoch)?;
        self.send(conn, op)
    }

    /// Gives `epoch` up.
    pub(super) fn abandon(&mut self, epoch: u64) -> Result<(), NetError> {
        Ok(self.state.abandon(epoch)?)
    }

    fn send(&mut self, conn: &mut Conn, op: PlugOp) -> Result<(), NetError> {
        let result = conn.change_plug(self.ifb(), plug_handle(self.major), op);
        self.state.outcome(match &result {
            Ok(()) => Outcome::Done,
            Err(e) if e.errno().is_some() => Outcome::Refused,
            Err(_) => Outcome::Unknown,
        });
        result
    }

    /// Reads what is held and lost. Packets lost since the last time are reported.
    pub(super) fn look(&mut self, conn: &mut Conn) -> Option<NetEvent> {
        if self.ifb_gone {
            return None;
        }
        let queue = match conn.root_qdisc(self.ifb()) {
            Ok(Some(queue)) if queue.handle == plug_handle(self.major) => queue,
            _ => return None,
        };
        let total = self.drops_before + u64::from(queue.drops);
        if let Ok(mut stats) = self.stats.lock() {
            *stats = DeviceStats {
                queued: queue.packets,
                queued_bytes: queue.bytes.saturating_sub(queue.packets * u64::from(PACKET_COST)),
                dropped: total,
            };
        }
        let packets = total.saturating_sub(self.drops_told);
        self.drops_told = total;
        (packets > 0).then(|| NetEvent::Dropped { vif: self.spec.vif.clone(), packets, total })
    }

    /// Puts a new plug in place of whatever is there, and brings the device up. What was held is lost.
    fn replace_plug(&mut self, conn: &mut Conn) -> Result<(), NetError> {
        if let Ok(Some(old)) = conn.root_qdisc(self.ifb())
            && old.handle == plug_handle(self.major)
        {
            // What it held counts as lost; what a reset has emptied before cannot be known.
            self.drops_before += u64::from(old.drops) + old.packets;
            self.drops_told = self.drops_before;
        }
        self.put_next_plug(conn)?;
        conn.set_up(self.ifb())?;
        let open = self.spec.scripted && !self.state.is_armed();
        if let Some(op) = self.state.replaced().or(open.then_some(PlugOp::ReleaseIndefinite)) {
            conn.change_plug(self.ifb(), plug_handle(self.major), op)?;
        }
        Ok(())
    }

    /// A new plug, empty and closed, under a handle of its own.
    fn put_next_plug(&mut self, conn: &mut Conn) -> Result<(), NetError> {
        let major = if self.major == FIRST_MAJOR + 0xff { FIRST_MAJOR } else { self.major + 1 };
        conn.put_plug(self.ifb(), major, self.spec.limit)?;
        self.major = major;
        Ok(())
    }

    /// Reacts to what happened behind our back.
    pub(super) fn notice(&mut self, conn: &mut Conn, notice: &Notice) -> Option<NetEvent> {
        match notice {
            Notice::Link(link) if link.index == self.ifb.index => {
                let what = if !link.up {
                    "the intermediate device was taken down"
                } else if link.txqlen != self.ifb.txqlen {
                    self.ifb.txqlen = link.txqlen;
                    "the intermediate device's queue length was changed"
                } else {
                    return None;
                };
                Some(self.was_reset(conn, what))
            }
            Notice::Link(link) if link.name == self.spec.vif && self.vif_index != Some(link.index) => {
                Some(self.appeared(conn, link.index))
            }
            Notice::LinkGone { index } if *index == self.ifb.index && !self.ifb_gone => {
                self.ifb_gone = true;
                self.state.give_up();
                Some(self.gone(&self.spec.ifb))
            }
            Notice::LinkGone { index } if self.vif_index == Some(*index) => {
                self.vif_index = None;
                Some(self.gone(&self.spec.vif))
            }
            Notice::Root { index, handle, what } if *index == self.ifb.index => self.root_changed(conn, *handle, what),
            Notice::IngressGone { index } if self.vif_index == Some(*index) && self.state.is_armed() => {
                Some(self.redirect_lost(conn, "the ingress qdisc was removed"))
            }
            Notice::FilterGone { index, .. } if self.vif_index == Some(*index) && self.state.is_armed() => {
                // It may be another filter than ours, as the seal.
                let there = self.vif().map(|vif| conn.filters(vif));
                match there {
                    Some(Ok(filters)) if filters.iter().any(super::wire::Filter::is_redirect) => None,
                    _ => Some(self.redirect_lost(conn, "the redirect was removed")),
                }
            }
            _ => None,
        }
    }

    /// Notifications were lost: a reset may have been among them.
    pub(super) fn notices_lost(&mut self, conn: &mut Conn) -> Vec<NetEvent> {
        if self.ifb_gone {
            return Vec::new();
        }
        let mut events = vec![self.was_reset(conn, "notifications were lost, it may have been reset")];
        let redirected = match self.vif() {
            Some(vif) if self.state.is_armed() => {
                conn.filters(vif).is_ok_and(|f| f.iter().any(super::wire::Filter::is_redirect))
            }
            _ => true,
        };
        if !redirected {
            events.push(self.redirect_lost(conn, "the redirect is gone"));
        }
        events
    }

    fn root_changed(&mut self, conn: &mut Conn, handle: TcHandle, what: &str) -> Option<NetEvent> {
        // One change by others makes several notices. What does not speak of the plug that is there now is
        // about the time before it.
        let ours = plug_handle(self.major);
        let there = conn.root_qdisc(self.ifb()).ok().flatten().map(|q| q.handle);
        if handle != ours && there == Some(ours) {
            return None;
        }
        let failed = self.replace_plug(conn).err();
        if failed.is_some() {
            self.state.give_up();
        }
        Some(self.foreign(what.to_owned(), self.state.is_armed(), failed))
    }

    fn was_reset(&mut self, conn: &mut Conn, what: &str) -> NetEvent {
        match self.replace_plug(conn) {
            Ok(()) => NetEvent::Reset { vif: self.spec.vif.clone(), what: what.to_owned() },
            // A device goes down before it goes.
            Err(e) if e.errno() == Some(libc::ENODEV) => {
                self.state.give_up();
                self.ifb_gone = true;
                self.gone(&self.spec.ifb)
            }
            // The counters lie and stay so: nothing may be released by them any more.
            Err(e) => {
                self.state.give_up();
                self.foreign(what.to_owned(), false, Some(e))
            }
        }
    }

    fn redirect_lost(&mut self, conn: &mut Conn, what: &str) -> NetEvent {
        let failed = match self.vif() {
            Some(vif) => conn.add_redirect(vif, self.ifb.index).err(),
            None => None,
        };
        self.foreign(what.to_owned(), true, failed)
    }

    fn appeared(&mut self, conn: &mut Conn, index: u32) -> NetEvent {
        let failed = conn.add_seal(On { name: &self.spec.vif, index });
        self.vif_index = Some(index);
        NetEvent::Appeared { vif: self.spec.vif.clone(), failed: failed.err().map(|e| e.to_string()) }
    }

    fn gone(&self, name: &str) -> NetEvent {
        NetEvent::Gone { vif: self.spec.vif.clone(), name: name.to_owned() }
    }

    fn foreign(&self, what: String, leaked: bool, failed: Option<NetError>) -> NetEvent {
        NetEvent::Foreign { vif: self.spec.vif.clone(), what, leaked, failed: failed.map(|e| e.to_string()) }
    }
}
