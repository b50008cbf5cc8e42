//! What an offer must fulfil on this host.

use super::Decline;
use crate::backup::host::IncomingDomain;
use crate::backup::incoming::incoming_name;
use crate::gate::autostart::{self, Finding, Xendomains};
use crate::link::{ProtectOffer, RefuseCode};
use crate::stream::handshake::INCOMING_SUFFIX;

pub(super) fn check_offer(offer: &ProtectOffer) -> Result<(), Decline> {
    let refuse = |text: String| Err(Decline::Refuse(RefuseCode::Offer, text));
    let name = &offer.domain;
    if name.is_empty() || name.len() > 200 || name.contains(['/', '\0', '\n']) {
        return refuse(format!("{name:?} cannot be a domain's name"));
    }
    if name.ends_with(INCOMING_SUFFIX) {
        return refuse(format!("{name:?} is itself a copy that is being received"));
    }
    if offer.detection_ms < 100 {
        return refuse(format!("a detection time of {} ms is too short; 100 ms is the least", offer.detection_ms));
    }
    Ok(())
}

/// Nothing may start the domain on this host behind our back (hazard F4).
pub(super) fn check_autostart(offer: &ProtectOffer, xendomains: &Xendomains) -> Result<(), Decline> {
    match autostart::findings(xendomains, &offer.domain, offer.protection).first() {
        None => Ok(()),
        Some(Finding::Autostart { path } | Finding::SavedImage { path }) => Err(Decline::Refuse(
            RefuseCode::Host,
            format!(
                "xendomains on this host would start {} from {}, beside the guest: remove that here",
                offer.domain,
                path.display()
            ),
        )),
    }
}

pub(super) fn check_names(offer: &ProtectOffer, domains: &[IncomingDomain]) -> Result<(), Decline> {
    let incoming = incoming_name(&offer.domain);
    let clash = domains.iter().find(|domain| {
        let name = domain.name.as_ref();
        domain.uuid == offer.protection || name == Some(&offer.domain) || name == Some(&incoming)
    });
    let Some(domain) = clash else { return Ok(()) };
    let id = domain.domid;
    let text = if domain.dying {
        format!(
            "domain {id} of this host is still being torn down and holds the name or UUID of {}; try again shortly",
            offer.domain
        )
    } else {
        format!(
            "this host has a domain {} (id {id}) with the name or UUID of {}; if it is left over, `xl destroy {id}` here, then protect again",
            domain.name.as_deref().unwrap_or("without a name"),
            offer.domain
        )
    };
    Err(Decline::Refuse(RefuseCode::InUse, text))
}

pub(super) fn check_memory(offer: &ProtectOffer, free_kib: u64) -> Result<(), Decline> {
    // The domain's memory; libxl's estimate for its page tables (libxl_get_required_shadow_memory of Xen 4.17: a page per MiB and 256
    // pages per vCPU, each counted twice for HAP); and 2 MiB for what Xen itself keeps of a domain.
    let tables = 4 * (256 * u64::from(offer.vcpus) + 2 * (offer.max_memory_kib / 1024));
    let needed = offer.max_memory_kib.saturating_add(tables).saturating_add(2048);
    if needed <= free_kib {
        return Ok(());
    }
    Err(Decline::Refuse(
        RefuseCode::Memory,
        format!(
            "{} needs {} MiB on this host, which has {} MiB free: destroy a domain here, or give Xen memory back with `xl mem-set 0 SIZE`",
            offer.domain,
            needed.div_ceil(1024),
            free_kib / 1024
        ),
    ))
}
