//! Notifications of the kernel, reduced to what may concern a buffered interface. No I/O.

use netlink_packet_route::tc::TcHandle;

use super::messages::INGRESS_FILTERS;
use super::wire::{
    Filter, Link, Qdisc, RTM_DELLINK, RTM_DELQDISC, RTM_DELTFILTER, RTM_NEWLINK, RTM_NEWQDISC, RTM_NEWTFILTER, Raw,
};

/// Something changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Notice {
    /// An interface is there, or changed.
    Link(Link),
    /// An interface is gone.
    LinkGone { index: u32 },
    /// Somebody else put, changed or removed the root qdisc of a device: the one with this handle.
    Root { index: u32, handle: TcHandle, what: String },
    /// Somebody else removed the qdisc that filters hang on.
    IngressGone { index: u32 },
    /// Somebody else removed filters of this preference.
    FilterGone { index: u32, preference: u16 },
}

/// The notice in a message, if there is one. Queue and filter changes carry the port of whoever asked for them:
/// those of `own_port` are ours. Links do not; their state speaks for itself.
pub(super) fn notice(raw: &Raw, own_port: u32) -> Option<Notice> {
    match raw.kind {
        RTM_NEWLINK => Link::parse(&raw.body).map(Notice::Link),
        RTM_DELLINK => Link::parse(&raw.body).map(|link| Notice::LinkGone { index: link.index }),
        _ if raw.port == own_port => None,
        RTM_NEWQDISC | RTM_DELQDISC => qdisc(raw),
        RTM_NEWTFILTER | RTM_DELTFILTER => {
            let filter = Filter::parse(&raw.body)?;
            let ingress = filter.parent == INGRESS_FILTERS
                || filter.parent.major == INGRESS_FILTERS.major && filter.parent.minor == 0;
            (raw.kind == RTM_DELTFILTER && ingress)
                .then_some(Notice::FilterGone { index: filter.index, preference: filter.preference })
        }
        _ => None,
    }
}

fn qdisc(raw: &Raw) -> Option<Notice> {
    let qdisc = Qdisc::parse(&raw.body)?;
    let gone = raw.kind == RTM_DELQDISC;
    if qdisc.parent == TcHandle::ROOT {
        let verb = if gone { "removed" } else { "put or changed" };
        return Some(Notice::Root {
            index: qdisc.index,
            handle: qdisc.handle,
            what: format!("{} qdisc {:x}: {verb} by port {}", qdisc.kind, qdisc.handle.major, raw.port),
        });
    }
    (gone && qdisc.parent == TcHandle::INGRESS).then_some(Notice::IngressGone { index: qdisc.index })
}
