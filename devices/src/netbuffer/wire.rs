//! Reading what the kernel sends: only what is needed, and tolerant of everything else.
//!
//! The typed parsers of netlink-packet-route fail on a message when any attribute of it surprises them, also
//! one of another process's qdisc. What decides over a guest's output must not depend on that.

use netlink_packet_core::NlasIterator;
use netlink_packet_route::tc::{TcActionType, TcHandle, TcHeader};

/// `nlmsghdr` of `linux/netlink.h`.
const HEADER: usize = 16;
/// `sizeof(struct tcmsg)`.
const TCMSG: usize = 20;
/// `sizeof(struct ifinfomsg)`.
const IFINFOMSG: usize = 16;
/// `NLM_F_ACK_TLVS`.
const ACK_TLVS: u16 = 0x200;

pub(super) const NLMSG_ERROR: u16 = 2;
pub(super) const NLMSG_DONE: u16 = 3;
pub(super) const RTM_NEWLINK: u16 = 16;
pub(super) const RTM_DELLINK: u16 = 17;
pub(super) const RTM_NEWQDISC: u16 = 36;
pub(super) const RTM_DELQDISC: u16 = 37;
pub(super) const RTM_NEWTFILTER: u16 = 44;
pub(super) const RTM_DELTFILTER: u16 = 45;
/// `NLM_F_DUMP_INTR`: what was dumped changed meanwhile.
pub(super) const DUMP_INTERRUPTED: u16 = 0x10;

/// One netlink message, its body unparsed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Raw {
    pub kind: u16,
    pub flags: u16,
    pub sequence: u32,
    /// The port of the socket whose request this answers or reports.
    pub port: u32,
    pub body: Vec<u8>,
}

fn u16_at(b: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(b.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(b: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(b.get(at..at + 4)?.try_into().ok()?))
}

fn u64_at(b: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(b.get(at..at + 8)?.try_into().ok()?))
}

fn text(b: &[u8]) -> String {
    let end = b.iter().position(|c| *c == 0).unwrap_or(b.len());
    String::from_utf8_lossy(&b[..end]).into_owned()
}

/// The attributes of one level, with the flag bits off their types; ends at the first malformed one.
fn attributes(b: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    NlasIterator::new(b).map_while(Result::ok).map(|nla| (nla.kind() & 0x3fff, nla.into_inner())).map(
        |(kind, whole)| {
            let len = u16_at(whole, 0).map_or(0, usize::from).min(whole.len());
            (kind, whole.get(4..len).unwrap_or_default())
        },
    )
}

fn attribute(b: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(b).find(|a| a.0 == kind).map(|a| a.1)
}

/// Cuts a datagram into its messages.
pub(super) fn messages(datagram: &[u8]) -> Vec<Raw> {
    let mut found = Vec::new();
    let mut at = 0;
    while let Some(header) = datagram.get(at..at + HEADER) {
        let len = u32_at(header, 0).unwrap_or(0) as usize;
        let Some(message) = datagram.get(at..at + len).filter(|_| len >= HEADER) else {
            break;
        };
        found.push(Raw {
            kind: u16_at(header, 4).unwrap_or(0),
            flags: u16_at(header, 6).unwrap_or(0),
            sequence: u32_at(header, 8).unwrap_or(0),
            port: u32_at(header, 12).unwrap_or(0),
            body: message[HEADER..].to_vec(),
        });
        at += len.next_multiple_of(4);
    }
    found
}

impl Raw {
    /// For an answer: the error number (0 is success) and the kernel's words, if it gave any. With
    /// `NETLINK_CAP_ACK` only the request's header stands between them.
    pub(super) fn error(&self) -> Option<(i32, Option<String>)> {
        if self.kind != NLMSG_ERROR {
            return None;
        }
        let number = -u32_at(&self.body, 0)?.cast_signed();
        let words = (self.flags & ACK_TLVS != 0)
            .then(|| self.body.get(4 + HEADER..))
            .flatten()
            .and_then(|tlvs| attribute(tlvs, 1))
            .map(text);
        Some((number, words))
    }
}

/// An interface.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Link {
    pub index: u32,
    pub name: String,
    pub up: bool,
    pub txqlen: u32,
    /// The driver's kind: `ifb`, `veth`. Empty for physical and Xen interfaces.
    pub kind: String,
    /// Packets that have entered an IFB, were dropped on entry, and have left it.
    pub ifb_counts: (u64, u64, u64),
}

impl Link {
    /// `None` also for the messages a bridge sends about its ports: those say nothing about the interface.
    pub(super) fn parse(body: &[u8]) -> Option<Self> {
        if *body.first()? != 0 {
            return None;
        }
        let rest = body.get(IFINFOMSG..)?;
        let mut link = Link { index: u32_at(body, 4)?, up: u32_at(body, 8)? & 1 != 0, ..Link::default() };
        for (kind, value) in attributes(rest) {
            match kind {
                3 => link.name = text(value),
                13 => link.txqlen = u32_at(value, 0)?,
                18 => link.kind = attribute(value, 1).map(text).unwrap_or_default(),
                // struct rtnl_link_stats64: rx_packets, tx_packets, .., rx_dropped is the seventh.
                23 => {
                    link.ifb_counts = (u64_at(value, 0)?, u64_at(value, 48)?, u64_at(value, 8)?);
                }
                _ => {}
            }
        }
        Some(link)
    }
}

/// A qdisc.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Qdisc {
    pub index: u32,
    pub handle: TcHandle,
    pub parent: TcHandle,
    pub kind: String,
    pub packets: u64,
    /// With what the size table adds per packet.
    pub bytes: u64,
    pub drops: u32,
}

impl Qdisc {
    pub(super) fn parse(body: &[u8]) -> Option<Self> {
        let header = TcHeader::parse(body).ok()?;
        let mut qdisc = Qdisc {
            index: header.index.cast_unsigned(),
            handle: header.handle,
            parent: header.parent,
            kind: String::new(),
            packets: 0,
            bytes: 0,
            drops: 0,
        };
        for (kind, value) in attributes(body.get(TCMSG..)?) {
            match kind {
                1 => qdisc.kind = text(value),
                // TCA_STATS2, in it TCA_STATS_QUEUE: struct gnet_stats_queue.
                7 => {
                    if let Some(queue) = attribute(value, 3) {
                        qdisc.packets = u64::from(u32_at(queue, 0)?);
                        qdisc.bytes = u64::from(u32_at(queue, 4)?);
                        qdisc.drops = u32_at(queue, 8)?;
                    }
                }
                _ => {}
            }
        }
        Some(qdisc)
    }
}

/// A filter, as far as it may be one of ours.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Filter {
    pub index: u32,
    pub parent: TcHandle,
    pub preference: u16,
    pub kind: String,
    /// Of its first action: the kind.
    pub action: String,
    pub cookie: Vec<u8>,
    /// What becomes of a packet after that action.
    pub verdict: i32,
    /// mirred: where it redirects to; 0 when that device is gone.
    pub to: u32,
}

impl Filter {
    /// The kernel also lists filters without their options; those have no action.
    pub(super) fn parse(body: &[u8]) -> Option<Self> {
        let header = TcHeader::parse(body).ok()?;
        let mut filter = Filter {
            index: header.index.cast_unsigned(),
            parent: header.parent,
            preference: (header.info >> 16) as u16,
            ..Filter::default()
        };
        let attrs = body.get(TCMSG..)?;
        filter.kind = attribute(attrs, 1).map(text)?;
        // TCA_OPTIONS, TCA_MATCHALL_ACT, the action in slot 1.
        if filter.kind != "matchall" {
            return Some(filter);
        }
        let action =
            attribute(attrs, 2).and_then(|options| attribute(options, 2)).and_then(|actions| attribute(actions, 1));
        for (kind, value) in action.into_iter().flat_map(attributes) {
            match kind {
                1 => filter.action = text(value),
                6 => filter.cookie = value.to_vec(),
                // TCA_ACT_OPTIONS; gact and mirred both have their parameters in attribute 2.
                2 => {
                    if let Some(parms) = attribute(value, 2) {
                        filter.verdict = u32_at(parms, 8)?.cast_signed();
                        filter.to = u32_at(parms, 24).unwrap_or(0);
                    }
                }
                _ => {}
            }
        }
        Some(filter)
    }

    /// Whether it drops everything at the place of our seal, whoever made it.
    pub(super) fn is_seal(&self) -> bool {
        self.preference == super::messages::SEAL_PREFERENCE
            && self.action == "gact"
            && self.verdict == i32::from(TcActionType::Shot)
    }

    /// Whether it is our redirect.
    pub(super) fn is_redirect(&self) -> bool {
        self.action == "mirred" && self.cookie == super::messages::REDIRECT_COOKIE
    }
}
