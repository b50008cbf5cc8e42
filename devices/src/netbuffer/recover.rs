//! What a recovery after a crash needs: sealing, and finding and removing what an earlier run left behind.
//!
//! Nothing here needs a live handle. Each call opens a socket of its own and runs on a blocking thread.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::device::Ending;

use super::conn::Conn;
use super::error::NetError;
use super::names;
use super::ops::On;
use super::takedown::{IfbFate, take_down};

/// How long held output may take to leave when it is released.
const PATIENCE: Duration = Duration::from_secs(2);

/// What an earlier run has left in the kernel, for one interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leftover {
    /// The guest's interface, unless it is gone, or was never armed (then nothing leads from it to the
    /// intermediate device and only the domain is known).
    pub vif: Option<String>,
    /// The intermediate device, unless it is gone: then the interface sends nothing any more.
    pub ifb: Option<String>,
    /// The domain and device the intermediate device was made for, from its name.
    pub device: Option<(u32, u32)>,
    /// Whether output goes to the intermediate device: it was armed.
    pub redirected: bool,
    /// Whether the interface is sealed.
    pub sealed: bool,
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce(&mut Conn) -> Result<T, NetError> + Send + 'static,
) -> Result<T, NetError> {
    tokio::task::spawn_blocking(move || work(&mut Conn::open()?)).await.unwrap_or(Err(NetError::NoWorker))
}

fn on(conn: &mut Conn, vif: &str) -> Result<u32, NetError> {
    conn.link(vif)?.map(|link| link.index).ok_or_else(|| NetError::NoLink(vif.to_owned()))
}

/// Drops everything the guest sends through `vif` from here on, of every protocol, also what would be held.
/// There is no moment in which anything passes: the drop comes before a redirect, which stays. Fine if it is
/// sealed already. A vif script gets the same with
/// `tc qdisc add dev VIF ingress; tc filter add dev VIF ingress pref 1 protocol all matchall action drop`.
///
/// What was held before stays held.
///
/// # Errors
/// Without such an interface, without the kernel's modules, or when somebody else's filter is in the place.
pub async fn seal(vif: &str) -> Result<(), NetError> {
    let vif = vif.to_owned();
    blocking(move |conn| {
        let index = on(conn, &vif)?;
        conn.add_seal(On { name: &vif, index })
    })
    .await
}

/// Takes the seal away, whoever made it. Output then flows, or goes to the buffer if one is armed. Fine if
/// there is none. Only the owner of the guest may do this (rule R9).
///
/// # Errors
/// Without such an interface.
pub async fn unseal(vif: &str) -> Result<(), NetError> {
    let vif = vif.to_owned();
    blocking(move |conn| {
        let index = on(conn, &vif)?;
        let on = On { name: &vif, index };
        conn.remove_seal(on)?;
        conn.remove_idle_ingress(on)
    })
    .await
}

/// Whether `vif` is sealed, by us or by a vif script.
///
/// # Errors
/// Without such an interface.
pub async fn is_sealed(vif: &str) -> Result<bool, NetError> {
    let vif = vif.to_owned();
    blocking(move |conn| {
        let index = on(conn, &vif)?;
        let filters = conn.filters(On { name: &vif, index })?;
        Ok(filters.iter().any(super::wire::Filter::is_seal))
    })
    .await
}

/// Every intermediate device with a name of ours, and every interface with a redirect of ours, in this network
/// namespace. Those of a running protection are found too: ask before it is set up.
///
/// # Errors
/// When the kernel cannot be asked.
pub async fn leftovers() -> Result<Vec<Leftover>, NetError> {
    blocking(find).await
}

fn find(conn: &mut Conn) -> Result<Vec<Leftover>, NetError> {
    let links = conn.links()?;
    let with_ingress: Vec<u32> = conn
        .qdiscs()?
        .into_iter()
        .filter(|q| q.parent == netlink_packet_route::tc::TcHandle::INGRESS)
        .map(|q| q.index)
        .collect();
    let mut found: Vec<(u32, Leftover)> = links
        .iter()
        .filter(|link| link.kind == "ifb")
        .filter_map(|link| {
            let device = names::device_of(&link.name)?;
            Some((
                link.index,
                Leftover {
                    vif: None,
                    ifb: Some(link.name.clone()),
                    device: Some(device),
                    redirected: false,
                    sealed: false,
                },
            ))
        })
        .collect();
    for link in links.iter().filter(|l| with_ingress.contains(&l.index)) {
        let filters = conn.filters(On { name: &link.name, index: link.index })?;
        let sealed = filters.iter().any(super::wire::Filter::is_seal);
        for redirect in filters.iter().filter(|f| f.is_redirect()) {
            let leftover = match found.iter_mut().find(|(index, _)| *index == redirect.to) {
                Some((_, leftover)) => leftover,
                None => {
                    found.push((0, Leftover { vif: None, ifb: None, device: None, redirected: true, sealed }));
                    &mut found.last_mut().expect("just pushed").1
                }
            };
            leftover.vif = Some(link.name.clone());
            leftover.redirected = true;
            leftover.sealed = sealed;
        }
    }
    Ok(found.into_iter().map(|(_, leftover)| leftover).collect())
}

/// Removes what an earlier run has left. `Release`: held output flows first, since this host owns the guest;
/// whatever sealed the interface stays. `Discard`: the interface is sealed and held output dropped. `Hold`:
/// nothing. Fine if it is gone.
///
/// # Errors
/// The step that failed. A failed `Discard` leaves everything closed.
pub async fn remove_leftover(leftover: &Leftover, ending: Ending) -> Result<(), NetError> {
    let Leftover { vif, ifb, .. } = leftover.clone();
    blocking(move |conn| {
        take_down(conn, &vif.unwrap_or_default(), &ifb.unwrap_or_default(), ending, PATIENCE, IfbFate::Remove)
    })
    .await
}
