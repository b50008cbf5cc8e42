//! What is done to the kernel's devices and queues, one step at a time. Blocking.

use netlink_packet_core::{NLM_F_CREATE, NLM_F_ECHO, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::tc::TcHandle;

use super::conn::Conn;
use super::error::NetError;
use super::messages as msg;
use super::plug_model::PlugOp;
use super::wire::{Filter, Link, Qdisc, RTM_NEWLINK, RTM_NEWQDISC, RTM_NEWTFILTER};

/// An existing interface by its name and index; the name is for messages to people.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct On<'a> {
    pub name: &'a str,
    pub index: u32,
}

impl Conn {
    /// An interface by its name; there is none of an empty name.
    pub(super) fn link(&mut self, name: &str) -> Result<Option<Link>, NetError> {
        if name.is_empty() {
            return Ok(None);
        }
        match self.request(msg::get_link(name), 0, name, "look it up") {
            Ok(found) => Ok(found.iter().filter(|raw| raw.kind == RTM_NEWLINK).find_map(|raw| Link::parse(&raw.body))),
            Err(e) if e.errno() == Some(libc::ENODEV) => Ok(None),
            Err(e) => Err(e),
        }
    }

    pub(super) fn links(&mut self) -> Result<Vec<Link>, NetError> {
        let found = self.dump(&msg::get_links(), "all interfaces", "list them")?;
        Ok(found.iter().filter_map(|raw| Link::parse(&raw.body)).collect())
    }

    pub(super) fn create_ifb(&mut self, name: &str) -> Result<Link, NetError> {
        self.request(msg::create_ifb(name), NLM_F_CREATE | NLM_F_EXCL, name, "create it").map_err(|e| {
            match e.errno() {
                Some(libc::EEXIST) => NetError::Leftover { ifb: name.to_owned() },
                _ => e.missing_if(libc::EOPNOTSUPP, "ifb"),
            }
        })?;
        self.link(name)?.ok_or_else(|| NetError::NoLink(name.to_owned()))
    }

    pub(super) fn set_up(&mut self, on: On<'_>) -> Result<(), NetError> {
        self.request(msg::set_up(on.index), 0, on.name, "bring it up")?;
        Ok(())
    }

    /// Removes an interface; fine if it is gone.
    pub(super) fn delete_link(&mut self, on: On<'_>) -> Result<(), NetError> {
        gone_is_fine(self.request(msg::delete_link(on.index), 0, on.name, "remove it"))
    }

    /// A new, empty, closed plug at the root, atomically in place of what was there.
    pub(super) fn put_plug(&mut self, on: On<'_>, major: u16, limit: u32) -> Result<(), NetError> {
        self.request(
            msg::put_plug(on.index, msg::plug_handle(major), limit),
            NLM_F_CREATE | NLM_F_REPLACE,
            on.name,
            "add a plug qdisc",
        )
        .map_err(|e| e.missing_if(libc::ENOENT, "sch_plug"))?;
        Ok(())
    }

    pub(super) fn change_plug(&mut self, on: On<'_>, handle: TcHandle, op: PlugOp) -> Result<(), NetError> {
        let doing = match op {
            PlugOp::Buffer => "close the epoch (BUFFER)",
            PlugOp::ReleaseOne => "release the epoch (RELEASE_ONE)",
            PlugOp::ReleaseIndefinite => "release everything (RELEASE_INDEFINITE)",
        };
        self.request(msg::change_plug(on.index, handle, op), 0, on.name, doing)?;
        Ok(())
    }

    pub(super) fn root_qdisc(&mut self, on: On<'_>) -> Result<Option<Qdisc>, NetError> {
        let found = self.request(msg::get_root_qdisc(on.index), NLM_F_ECHO, on.name, "read its queue")?;
        Ok(found.iter().filter(|raw| raw.kind == RTM_NEWQDISC).find_map(|raw| Qdisc::parse(&raw.body)))
    }

    /// The kind of qdisc on what the interface receives: `ingress`, `clsact`, or none.
    pub(super) fn ingress_kind(&mut self, index: u32) -> Result<Option<String>, NetError> {
        Ok(self.qdiscs()?.into_iter().find(|q| q.index == index && q.parent == TcHandle::INGRESS).map(|q| q.kind))
    }

    pub(super) fn qdiscs(&mut self) -> Result<Vec<Qdisc>, NetError> {
        let found = self.dump(&msg::get_qdiscs(), "all interfaces", "list their queues")?;
        Ok(found.iter().filter_map(|raw| Qdisc::parse(&raw.body)).collect())
    }

    /// Makes sure filters can be added. A clsact qdisc of somebody else's does as well.
    pub(super) fn ensure_ingress(&mut self, on: On<'_>) -> Result<(), NetError> {
        match self.request(msg::add_ingress(on.index), NLM_F_CREATE | NLM_F_EXCL, on.name, "add an ingress qdisc") {
            Err(e) if e.errno().is_some() && self.ingress_kind(on.index)?.is_none() => {
                Err(e.missing_if(libc::ENOENT, "sch_ingress"))
            }
            Err(e) if e.errno().is_none() => Err(e),
            _ => Ok(()),
        }
    }

    pub(super) fn filters(&mut self, on: On<'_>) -> Result<Vec<Filter>, NetError> {
        let found = self.dump(&msg::get_filters(on.index), on.name, "list its filters")?;
        Ok(found
            .iter()
            .filter(|raw| raw.kind == RTM_NEWTFILTER)
            .filter_map(|raw| Filter::parse(&raw.body))
            .filter(|f| f.index == on.index)
            .collect())
    }

    /// Everything received by `on` goes to `to`'s queue from here on. Fine if it does already.
    pub(super) fn add_redirect(&mut self, on: On<'_>, to: u32) -> Result<(), NetError> {
        self.ensure_ingress(on)?;
        self.add_filter(
            on,
            msg::add_redirect(on.index, to),
            msg::REDIRECT_PREFERENCE,
            "redirect what it receives",
            "act_mirred",
            |f| f.is_redirect() && f.to == to,
        )
    }

    /// Everything received by `on` is dropped from here on, before any redirect. Fine if it is already.
    pub(super) fn add_seal(&mut self, on: On<'_>) -> Result<(), NetError> {
        self.ensure_ingress(on)?;
        self.add_filter(
            on,
            msg::add_seal(on.index),
            msg::SEAL_PREFERENCE,
            "drop what it receives",
            "act_gact",
            Filter::is_seal,
        )
    }

    fn add_filter(
        &mut self,
        on: On<'_>,
        message: netlink_packet_route::RouteNetlinkMessage,
        preference: u16,
        doing: &'static str,
        action_module: &'static str,
        ours: impl Fn(&Filter) -> bool,
    ) -> Result<(), NetError> {
        let Err(e) = self.request(message, NLM_F_CREATE | NLM_F_EXCL, on.name, doing) else {
            return Ok(());
        };
        if e.errno() == Some(libc::ENOENT) {
            // Both the classifier and the action are looked up by the kernel; its words tell which.
            let module = if e.to_string().contains("action") { action_module } else { "cls_matchall" };
            return Err(NetError::MissingModule { module });
        }
        if e.errno().is_none() {
            return Err(e);
        }
        let there = self.filters(on)?;
        if there.iter().any(ours) {
            return Ok(());
        }
        if there.iter().any(|f| f.preference == preference) {
            return Err(NetError::ForeignFilter { link: on.name.to_owned(), preference });
        }
        Err(e)
    }

    /// Takes our redirect away; fine if there is none.
    pub(super) fn remove_redirect(&mut self, on: On<'_>) -> Result<(), NetError> {
        self.remove_filter(on, msg::REDIRECT_PREFERENCE, Filter::is_redirect)
    }

    /// Takes the seal away; fine if there is none.
    pub(super) fn remove_seal(&mut self, on: On<'_>) -> Result<(), NetError> {
        self.remove_filter(on, msg::SEAL_PREFERENCE, Filter::is_seal)
    }

    fn remove_filter(&mut self, on: On<'_>, preference: u16, ours: fn(&Filter) -> bool) -> Result<(), NetError> {
        match self.filters(on) {
            Ok(there) if !there.iter().any(ours) => return Ok(()),
            Err(e) => return gone_is_fine::<()>(Err(e)),
            Ok(_) => {}
        }
        gone_is_fine(self.request(msg::delete_filter(on.index, preference), 0, on.name, "remove a filter"))
    }

    /// Takes the ingress qdisc away if nothing hangs on it any more. Without filters it does nothing, so it
    /// does not matter who made it.
    pub(super) fn remove_idle_ingress(&mut self, on: On<'_>) -> Result<(), NetError> {
        if self.ingress_kind(on.index)?.as_deref() != Some("ingress") {
            return Ok(());
        }
        if !self.filters(on)?.is_empty() {
            return Ok(());
        }
        gone_is_fine(self.request(msg::delete_ingress(on.index), 0, on.name, "remove its ingress qdisc"))
    }
}

fn gone_is_fine<T>(result: Result<T, NetError>) -> Result<(), NetError> {
    match result {
        Err(e) if matches!(e.errno(), Some(libc::ENODEV | libc::ENOENT)) => Ok(()),
        Err(e) => Err(e),
        Ok(_) => Ok(()),
    }
}
