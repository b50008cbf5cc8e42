//! Every request that is sent to the kernel, as a typed message.
//!
//! The plug qdisc's options are one raw structure right inside `TCA_OPTIONS` (`struct tc_plug_qopt` of
//! `linux/pkt_sched.h`). `TcAttribute::Options` would nest another attribute header around it, which the kernel
//! takes without complaint and reads as a limit of a few bytes. The tests at the end pin the bytes.

use netlink_packet_core::DefaultNla;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkMessage};
use netlink_packet_route::tc::{
    TcAction, TcActionAttribute, TcActionGeneric, TcActionMirror, TcActionMirrorOption, TcActionOption, TcActionType,
    TcAttribute, TcFilterMatchAll, TcFilterMatchAllOption, TcHandle, TcHeader, TcMessage, TcMirror, TcMirrorActionType,
    TcOption,
};
use rtnetlink::{LinkIfb, LinkUnspec};

use super::plug_model::PlugOp;

/// The kernel's name of the plug qdisc.
pub(super) const PLUG: &str = "plug";

/// `TCA_OPTIONS`.
const TCA_OPTIONS: u16 = 2;
/// `TCQ_PLUG_LIMIT`, whose effect at creation is that `limit` is taken and nothing else.
const TCQ_PLUG_LIMIT: i32 = 3;
/// `TCA_GACT_PARMS` of `linux/tc_act/tc_gact.h`.
const TCA_GACT_PARMS: u16 = 2;
/// `ETH_P_ALL` in network byte order, as the low half of `tcm_info`.
const ALL_PROTOCOLS: u16 = 0x0003u16.to_be();

/// Where filters on what a device receives hang: the class of both the ingress and the clsact qdisc.
pub(super) const INGRESS_FILTERS: TcHandle = TcHandle { major: 0xffff, minor: TcHandle::MIN_INGRESS };

/// The kernel looks at filters in order of preference: a seal before a redirect, so that adding one seals a
/// buffered interface without a moment in which it is neither.
pub(super) const SEAL_PREFERENCE: u16 = 1;
/// The preference of the redirect.
pub(super) const REDIRECT_PREFERENCE: u16 = 2;
/// Marks our redirect (an action's cookie, which the kernel keeps and shows): `tc` prints it in hex.
pub(super) const REDIRECT_COOKIE: &[u8] = b"remusd-redirect";
/// Marks our seal. A seal made with `tc` need not have it.
pub(super) const SEAL_COOKIE: &[u8] = b"remusd-seal";

fn tc(index: u32, handle: TcHandle, parent: TcHandle, info: u32) -> TcMessage {
    let header = TcHeader {
        // The kernel's `tcm_ifindex` is signed; it never gives out an index that does not fit.
        index: index.cast_signed(),
        handle,
        parent,
        info,
        ..TcHeader::default()
    };
    TcMessage::from_parts(header, Vec::new())
}

/// The handle of our `major`th plug.
pub(super) fn plug_handle(major: u16) -> TcHandle {
    TcHandle { major, minor: 0 }
}

/// Creates an intermediate device, down.
pub(super) fn create_ifb(name: &str) -> RouteNetlinkMessage {
    RouteNetlinkMessage::NewLink(LinkIfb::new(name).build())
}

/// Brings a device up.
pub(super) fn set_up(index: u32) -> RouteNetlinkMessage {
    RouteNetlinkMessage::SetLink(LinkUnspec::new_with_index(index).up().build())
}

/// Removes a device and with it its qdiscs.
pub(super) fn delete_link(index: u32) -> RouteNetlinkMessage {
    RouteNetlinkMessage::DelLink(LinkUnspec::new_with_index(index).build())
}

/// Asks for one device by name.
pub(super) fn get_link(name: &str) -> RouteNetlinkMessage {
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::IfName(name.to_owned()));
    RouteNetlinkMessage::GetLink(message)
}

/// Asks for all devices (a dump).
pub(super) fn get_links() -> RouteNetlinkMessage {
    RouteNetlinkMessage::GetLink(LinkMessage::default())
}

fn plug_options(action: i32, limit: u32) -> TcAttribute {
    let mut options = action.to_ne_bytes().to_vec();
    options.extend_from_slice(&limit.to_ne_bytes());
    TcAttribute::Other(DefaultNla::new(TCA_OPTIONS, options))
}

/// What a held packet costs beyond its bytes, at most, in bytes: its descriptor and head (768), and a page of
/// which it uses little (4096). Without this a guest that sends small packets has this host hold many times the limit.
pub const PACKET_COST: u32 = 4864;

/// A size table without a table (`TCA_STAB_BASE` with a `struct tc_sizespec` of `linux/pkt_sched.h`): only the
/// overhead is added to each packet's length when the queue adds up what it holds.
fn packet_cost() -> Vec<u8> {
    let mut spec = Vec::new();
    spec.extend(28u16.to_ne_bytes());
    spec.extend(1u16.to_ne_bytes());
    // cell_log, size_log, cell_align.
    spec.extend([0; 4]);
    spec.extend(PACKET_COST.to_ne_bytes());
    // linklayer, mpu, mtu, tsize.
    spec.extend([0; 16]);
    spec
}

/// Puts a new plug, closed and holding at most `limit` bytes, in place of whatever the root qdisc is.
pub(super) fn put_plug(index: u32, handle: TcHandle, limit: u32) -> RouteNetlinkMessage {
    let mut message = tc(index, handle, TcHandle::ROOT, 0);
    message.attributes.push(TcAttribute::Kind(PLUG.into()));
    message.attributes.push(TcAttribute::Stab(packet_cost()));
    message.attributes.push(plug_options(TCQ_PLUG_LIMIT, limit));
    RouteNetlinkMessage::NewQueueDiscipline(message)
}

/// Changes a plug. With its handle in the message, another qdisc in its place refuses. A change without a size
/// table takes away the one that is there.
pub(super) fn change_plug(index: u32, handle: TcHandle, op: PlugOp) -> RouteNetlinkMessage {
    let action = match op {
        PlugOp::Buffer => 0,
        PlugOp::ReleaseOne => 1,
        PlugOp::ReleaseIndefinite => 2,
    };
    let mut message = tc(index, handle, TcHandle::ROOT, 0);
    message.attributes.push(TcAttribute::Kind(PLUG.into()));
    message.attributes.push(TcAttribute::Stab(packet_cost()));
    message.attributes.push(plug_options(action, 0));
    RouteNetlinkMessage::NewQueueDiscipline(message)
}

/// Asks for the root qdisc. Needs `NLM_F_ECHO`, or the answer goes to listeners only.
pub(super) fn get_root_qdisc(index: u32) -> RouteNetlinkMessage {
    RouteNetlinkMessage::GetQueueDiscipline(tc(index, TcHandle::UNSPEC, TcHandle::ROOT, 0))
}

/// Asks for all qdiscs (a dump).
pub(super) fn get_qdiscs() -> RouteNetlinkMessage {
    RouteNetlinkMessage::GetQueueDiscipline(tc(0, TcHandle::UNSPEC, TcHandle::UNSPEC, 0))
}

fn ingress(index: u32) -> TcMessage {
    let handle = TcHandle { major: 0xffff, minor: 0 };
    let mut message = tc(index, handle, TcHandle::INGRESS, 0);
    message.attributes.push(TcAttribute::Kind("ingress".into()));
    message
}

/// Adds the qdisc that filters on received packets hang on.
pub(super) fn add_ingress(index: u32) -> RouteNetlinkMessage {
    RouteNetlinkMessage::NewQueueDiscipline(ingress(index))
}

/// Removes it, and every filter on it.
pub(super) fn delete_ingress(index: u32) -> RouteNetlinkMessage {
    RouteNetlinkMessage::DelQueueDiscipline(ingress(index))
}

fn filter(index: u32, preference: u16) -> TcMessage {
    let info = u32::from(preference) << 16 | u32::from(ALL_PROTOCOLS);
    let mut message = tc(index, TcHandle::UNSPEC, INGRESS_FILTERS, info);
    message.attributes.push(TcAttribute::Kind(TcFilterMatchAll::KIND.into()));
    message
}

fn action(slot: u16, kind: &str, options: TcActionOption, cookie: &[u8]) -> TcAction {
    let mut action = TcAction::default();
    action.tab = slot;
    action.attributes = vec![TcActionAttribute::Kind(kind.into()), TcActionAttribute::Options(vec![options])];
    if !cookie.is_empty() {
        action.attributes.push(TcActionAttribute::Cookie(cookie.to_vec()));
    }
    action
}

/// Drops the packet. The options are one `struct tc_gact`, which is the generic part of an action: index,
/// capabilities, action, two counts.
fn drop_it(slot: u16, cookie: &[u8]) -> TcAction {
    let mut parms = vec![0; 20];
    parms[8..12].copy_from_slice(&i32::from(TcActionType::Shot).to_ne_bytes());
    action(slot, "gact", TcActionOption::Other(DefaultNla::new(TCA_GACT_PARMS, parms)), cookie)
}

fn add_filter(index: u32, preference: u16, actions: Vec<TcAction>) -> RouteNetlinkMessage {
    let mut message = filter(index, preference);
    message.attributes.push(TcAttribute::Options(vec![TcOption::MatchAll(TcFilterMatchAllOption::Action(actions))]));
    RouteNetlinkMessage::NewTrafficFilter(message)
}

/// Sends whatever `index` receives, of every protocol, to the egress queue of `to` instead.
///
/// A redirect that ends there (`TC_ACT_STOLEN`) hands over the packet itself, which for Xen's netback is made of
/// the guest's own pages: while it is held the guest's transmit slot is taken, and the domain cannot be
/// destroyed. One that goes on (`TC_ACT_PIPE`) hands over a clone, and cloning copies such pages
/// (`skb_orphan_frags` in the kernel's `skb_clone`); the packet itself is then dropped, which completes it for
/// the guest. When cloning or redirecting fails, mirred drops the packet itself.
pub(super) fn add_redirect(index: u32, to: u32) -> RouteNetlinkMessage {
    let mut generic = TcActionGeneric::default();
    generic.action = TcActionType::Pipe;
    let mut mirror = TcMirror::default();
    mirror.generic = generic;
    mirror.eaction = TcMirrorActionType::EgressRedir;
    mirror.ifindex = to;
    let redirect =
        action(1, TcActionMirror::KIND, TcActionOption::Mirror(TcActionMirrorOption::Parms(mirror)), REDIRECT_COOKIE);
    add_filter(index, REDIRECT_PREFERENCE, vec![redirect, drop_it(2, &[])])
}

/// Drops whatever `index` receives, of every protocol.
pub(super) fn add_seal(index: u32) -> RouteNetlinkMessage {
    add_filter(index, SEAL_PREFERENCE, vec![drop_it(1, SEAL_COOKIE)])
}

/// Removes all filters of one preference.
pub(super) fn delete_filter(index: u32, preference: u16) -> RouteNetlinkMessage {
    RouteNetlinkMessage::DelTrafficFilter(filter(index, preference))
}

/// Asks for the filters on what `index` receives (a dump).
pub(super) fn get_filters(index: u32) -> RouteNetlinkMessage {
    RouteNetlinkMessage::GetTrafficFilter(tc(index, TcHandle::UNSPEC, INGRESS_FILTERS, 0))
}
