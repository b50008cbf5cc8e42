//! The bytes of every request, written down from the kernel's headers: `linux/netlink.h`, `linux/rtnetlink.h`,
//! `linux/pkt_sched.h`, `linux/pkt_cls.h`, `linux/tc_act/*.h`, in little-endian words as they go on the wire.

use netlink_packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_ECHO, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::TcHandle;

use super::conn::encode;
use super::messages::*;
use super::plug_model::PlugOp;
use super::watch::{Notice, notice};
use super::wire::{Filter, Link, Qdisc, Raw, messages};

const CHANGE: u16 = NLM_F_REQUEST | NLM_F_ACK;
const NEW: u16 = CHANGE | NLM_F_CREATE | NLM_F_EXCL;
const LIST: u16 = NLM_F_REQUEST | NLM_F_DUMP;

#[track_caller]
fn is(message: RouteNetlinkMessage, flags: u16, expected: &str) {
    let bytes = encode(message, flags, 1);
    let words: Vec<String> = bytes.chunks(4).map(|word| word.iter().map(|b| format!("{b:02x}")).collect()).collect();
    assert_eq!(words.join(" "), expected.split_whitespace().collect::<Vec<_>>().join(" "));
}

// Each message is: length, type and flags, sequence, port; then ifinfomsg or tcmsg; then attributes.

#[test]
fn links() {
    // IFLA_IFNAME (3), IFLA_LINKINFO (18) { IFLA_INFO_KIND (1) "ifb" }.
    is(
        create_ifb("rmifb3.0"),
        NEW,
        "3c000000 10000506 01000000 00000000  00000000 00000000 00000000 00000000
         0d000300 726d6966 62332e30 00000000  0c001200 08000100 69666200",
    );
    // RTM_SETLINK with IFF_UP in flags and in the mask of changed flags.
    is(set_up(7), CHANGE, "20000000 13000500 01000000 00000000  00000000 07000000 01000000 01000000");
    is(delete_link(7), CHANGE, "20000000 11000500 01000000 00000000  00000000 07000000 00000000 00000000");
    is(
        get_link("vif3.0"),
        CHANGE,
        "2c000000 12000500 01000000 00000000  00000000 00000000 00000000 00000000
         0b000300 76696633 2e300000",
    );
    is(get_links(), LIST, "20000000 12000103 01000000 00000000  00000000 00000000 00000000 00000000");
}

/// The options must come right after their header `0c000200`: another header between them (`08000200`) would be
/// taken for the action, and the action for a limit of a few bytes.
#[test]
fn plug() {
    // TCA_KIND (1) "plug", TCA_STAB (8) { TCA_STAB_BASE (1) { overhead 4864 (0x1300) } },
    // TCA_OPTIONS (2) { TCQ_PLUG_LIMIT (3), 64 MiB }.
    is(
        put_plug(7, plug_handle(0x5200), 64 << 20),
        CHANGE | NLM_F_CREATE | NLM_F_REPLACE,
        "5c000000 24000505 01000000 00000000  00000000 07000000 00000052 ffffffff 00000000
         09000100 706c7567 00000000
         20000800 1c000100 00000000 00130000 00000000 00000000 00000000 00000000
         0c000200 03000000 00000004",
    );
    for (op, action) in
        [(PlugOp::Buffer, "00000000"), (PlugOp::ReleaseOne, "01000000"), (PlugOp::ReleaseIndefinite, "02000000")]
    {
        is(
            change_plug(7, plug_handle(0x5200), op),
            CHANGE,
            &format!(
                "5c000000 24000500 01000000 00000000  00000000 07000000 00000052 ffffffff 00000000
                 09000100 706c7567 00000000
                 20000800 1c000100 00000000 00130000 00000000 00000000 00000000 00000000
                 0c000200 {action} 00000000"
            ),
        );
    }
    is(
        get_root_qdisc(7),
        CHANGE | NLM_F_ECHO,
        "24000000 26000d00 01000000 00000000  00000000 07000000 00000000 ffffffff 00000000",
    );
    is(get_qdiscs(), LIST, "24000000 26000103 01000000 00000000  00000000 00000000 00000000 00000000 00000000");
}

#[test]
fn ingress() {
    // Handle ffff:0, parent TC_H_INGRESS.
    let body = "01000000 00000000  00000000 06000000 0000ffff f1ffffff 00000000  0c000100 696e6772 65737300";
    is(add_ingress(6), NEW, &format!("30000000 24000506 {body}"));
    is(delete_ingress(6), CHANGE, &format!("30000000 25000500 {body}"));
}

#[test]
fn filters() {
    // tcm_info: preference in the high half, ETH_P_ALL in network order in the low one.
    // TCA_KIND "matchall", TCA_OPTIONS { TCA_MATCHALL_ACT (2) { 1: TCA_ACT_KIND (1) "mirred",
    // TCA_ACT_OPTIONS (2, nested) { TCA_MIRRED_PARMS (2) { 0, 0, TC_ACT_PIPE (3), 0, 0,
    // TCA_EGRESS_REDIR (1), ifindex 7 } }, TCA_ACT_COOKIE (6) },
    // 2: "gact" { TCA_GACT_PARMS (2) { 0, 0, TC_ACT_SHOT (2), 0, 0 } } }.
    is(
        add_redirect(6, 7),
        NEW,
        "b0000000 2c000506 01000000 00000000  00000000 06000000 00000000 f2ffffff 00030200
         0d000100 6d617463 68616c6c 00000000  7c000200 78000200 48000100
         0b000100 6d697272 65640000  24000280 20000200
         00000000 00000000 03000000 00000000 00000000 01000000 07000000
         13000600 72656d75 73642d72 65646972 65637400
         2c000200 09000100 67616374 00000000  1c000280 18000200
         00000000 00000000 02000000 00000000 00000000",
    );
    // "gact" alone.
    is(
        add_seal(6),
        NEW,
        "78000000 2c000506 01000000 00000000  00000000 06000000 00000000 f2ffffff 00030100
         0d000100 6d617463 68616c6c 00000000  44000200 40000200 3c000100
         09000100 67616374 00000000  1c000280 18000200
         00000000 00000000 02000000 00000000 00000000
         0f000600 72656d75 73642d73 65616c00",
    );
    is(
        delete_filter(6, REDIRECT_PREFERENCE),
        CHANGE,
        "34000000 2d000500 01000000 00000000  00000000 06000000 00000000 f2ffffff 00030200
         0d000100 6d617463 68616c6c 00000000",
    );
    is(get_filters(6), LIST, "24000000 2e000103 01000000 00000000  00000000 06000000 00000000 f2ffffff 00000000");
}

fn raw(message: RouteNetlinkMessage) -> Raw {
    messages(&encode(message, 0, 9)).remove(0)
}

#[test]
fn what_is_sent_is_read_back() {
    let redirect = Filter::parse(&raw(add_redirect(6, 7)).body).unwrap();
    assert!(redirect.is_redirect() && !redirect.is_seal());
    assert_eq!((redirect.index, redirect.to, redirect.preference), (6, 7, REDIRECT_PREFERENCE));
    let seal = Filter::parse(&raw(add_seal(6)).body).unwrap();
    assert!(seal.is_seal() && !seal.is_redirect());
    assert!(!Filter::parse(&raw(delete_filter(6, SEAL_PREFERENCE)).body).unwrap().is_seal(), "has no action");
    let plug = Qdisc::parse(&raw(put_plug(7, plug_handle(0x5201), 1)).body).unwrap();
    assert_eq!((plug.index, plug.kind.as_str(), plug.parent), (7, "plug", TcHandle::ROOT));
    assert_eq!(plug.handle, plug_handle(0x5201));
    let link = Link::parse(&raw(create_ifb("rmifb3.0")).body).unwrap();
    assert_eq!((link.name.as_str(), link.kind.as_str(), link.up), ("rmifb3.0", "ifb", false));
    assert!(Link::parse(&raw(set_up(7)).body).unwrap().up);
}

#[test]
fn datagrams_with_several_and_broken_messages() {
    let mut bytes = encode(get_link("vif3.0"), 0, 1);
    bytes.extend(encode(get_links(), 0, 2));
    assert_eq!(messages(&bytes).iter().map(|m| m.sequence).collect::<Vec<_>>(), [1, 2]);
    for len in 0..bytes.len() {
        assert!(messages(&bytes[..len]).len() < 2, "cut at {len}");
    }
    bytes[0] = 3;
    assert!(messages(&bytes).is_empty(), "shorter than its own header");
}

/// NLMSG_ERROR with NETLINK_EXT_ACK and NETLINK_CAP_ACK: number, the request's header, NLMSGERR_ATTR_MSG (1).
#[test]
fn a_refusal_with_the_kernels_words() {
    let mut body = (-2i32).to_ne_bytes().to_vec();
    body.extend([0; 16]);
    body.extend([9, 0, 1, 0]);
    body.extend(b"gone\0\0\0\0");
    let mut raw = Raw { kind: 2, flags: 0x300, sequence: 1, port: 0, body };
    assert_eq!(raw.error(), Some((2, Some("gone".into()))));
    raw.flags = 0x100;
    assert_eq!(raw.error(), Some((2, None)));
    raw.kind = 16;
    assert_eq!(raw.error(), None);
}

#[test]
fn notices() {
    let from = |port, kind, message| {
        let mut raw = raw(message);
        raw.port = port;
        raw.kind = kind;
        notice(&raw, 77)
    };
    let root = |port, kind| from(port, kind, put_plug(7, plug_handle(1), 1));
    assert_eq!(root(77, 36), None, "our own doing");
    assert!(matches!(root(78, 36), Some(Notice::Root { index: 7, .. })));
    assert!(matches!(root(78, 37), Some(Notice::Root { index: 7, .. })));
    assert_eq!(from(78, 36, add_ingress(6)), None, "an ingress qdisc more harms nobody");
    assert_eq!(from(78, 37, add_ingress(6)), Some(Notice::IngressGone { index: 6 }));
    let gone = Some(Notice::FilterGone { index: 6, preference: REDIRECT_PREFERENCE });
    assert_eq!(from(78, 45, add_redirect(6, 7)), gone);
    assert_eq!(from(78, 44, add_redirect(6, 7)), None);
    // Links say nothing about who changed them.
    assert_eq!(from(77, 17, delete_link(7)), Some(Notice::LinkGone { index: 7 }));
    assert!(matches!(from(0, 16, set_up(7)), Some(Notice::Link(link)) if link.up && link.index == 7));
    // A bridge reports its ports as links of family AF_BRIDGE, also when one leaves it and lives on.
    let mut port = raw(delete_link(7));
    port.body[0] = 7;
    assert_eq!(notice(&port, 77), None);
}
