//! `remus gate`: works on this host's files alone, so also while the daemon is dead.

use std::fmt::Write;
use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::config;
use super::install::Places;
use super::list::{Entry, GateList};
use super::vifs;
use crate::ids::{DomId, ProtectionId};
use crate::xen::{StoreError, XenStore};

/// `remus gate`.
#[derive(Debug, Args)]
pub struct GateArgs {
    /// The daemon's state folder.
    #[arg(long, default_value = "/var/lib/remus", global = true)]
    pub state_dir: PathBuf,
    /// What to do.
    #[command(subcommand)]
    pub command: GateCommand,
}

/// What to do with the gate.
#[derive(Debug, Subcommand)]
pub enum GateCommand {
    /// Put the hotplug script in front of the host's vif scripts and make it xl's default. Guests get it with their next start.
    Install,
    /// Take it away and put back what was there.
    Remove,
    /// Show whether it is in place, which domains it guards here and whether their interfaces are sealed.
    Status,
    /// Let a guarded domain of this host be seen: I have made sure that no other copy of it runs. If one does, two are live.
    Open {
        /// Domain name or UUID.
        domain: String,
    },
}

/// It cannot be done.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Refused(String);

fn refused(error: impl std::fmt::Display) -> Refused {
    Refused(error.to_string())
}

/// Does it; returns what to print.
///
/// # Errors
/// [`Refused`] with what is in the way.
pub async fn run(args: &GateArgs, places: &Places, store: &dyn XenStore) -> Result<String, Refused> {
    let list = GateList::new(&args.state_dir);
    match &args.command {
        GateCommand::Install => install(places),
        GateCommand::Remove => remove(&list, places, store).await,
        GateCommand::Status => status(&list, places, store).await,
        GateCommand::Open { domain } => open(args, &list, domain, store).await,
    }
}

/// `remus gate install`: needs no running Xen, so that a package can do it.
///
/// # Errors
/// [`Refused`] with what is in the way.
pub fn install(places: &Places) -> Result<String, Refused> {
    let done = places.install().map_err(refused)?;
    Ok(if done.is_empty() { "it is in place already".into() } else { done.join("\n") })
}

async fn remove(list: &GateList, places: &Places, store: &dyn XenStore) -> Result<String, Refused> {
    let guarded = list.entries().map_err(refused)?;
    if !guarded.is_empty() {
        let names: Vec<_> = guarded.iter().map(|entry| entry.name.as_str()).collect();
        return Err(Refused(format!(
            "this host guards {}: without the gate nothing keeps a copy that lost from being seen. End their protection, or \
             `remus gate open` them, first",
            names.join(", ")
        )));
    }
    let users = users(store).await.map_err(refused)?;
    let mut done = places.remove(!users.is_empty()).map_err(refused)?;
    if !users.is_empty() {
        done.push(format!(
            "the scripts stay for now: the vifs of domain {} were made with them and need them when they go; again when these have \
             ended",
            users.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
        ));
    }
    Ok(if done.is_empty() { "it is not in place".into() } else { done.join("\n") })
}

/// The domains that have a vif with the gate's script.
async fn users(store: &dyn XenStore) -> Result<Vec<DomId>, StoreError> {
    const VIFS: &str = "/local/domain/0/backend/vif";
    let mut users = Vec::new();
    for domain in store.directory(VIFS).await? {
        for device in store.directory(&format!("{VIFS}/{domain}")).await? {
            let script = store.read(&format!("{VIFS}/{domain}/{device}/script")).await?;
            if script.is_some_and(|script| config::is_gate(&script))
                && let Ok(domid) = domain.parse()
            {
                users.push(DomId(domid));
            }
        }
    }
    users.dedup();
    Ok(users)
}

async fn status(list: &GateList, places: &Places, store: &dyn XenStore) -> Result<String, Refused> {
    let status = places.status().map_err(refused)?;
    let mut text = String::new();
    let _ = match (status.complete(), status.script) {
        (true, _) => writeln!(text, "in place: {} is the default vif script", status.default),
        (false, true) => writeln!(
            text,
            "NOT in place: the default vif script is {}, missing are [{}]; `remus gate install`",
            status.default,
            status.missing.join(", ")
        ),
        (false, false) => writeln!(text, "NOT in place; `remus gate install`"),
    };
    let entries = list.entries().map_err(refused)?;
    if entries.is_empty() {
        let _ = writeln!(text, "guards nothing");
    }
    for entry in entries {
        let _ = writeln!(text, "guards {} ({}): {}", entry.name, entry.uuid, entry.why);
        for domid in domains_of(store, &entry).await.map_err(refused)? {
            for (vif, sealed) in vifs::sealed(store, domid).await.map_err(refused)? {
                let how = match (sealed, vifs::is_up(&vif)) {
                    (true, _) => "sealed",
                    (false, true) => "open",
                    // Netback has made it, and its hotplug script, which seals it, has yet to come.
                    (false, false) => "down",
                };
                let _ = writeln!(text, "  domain {domid}: {vif} is {how}");
            }
        }
    }
    Ok(text.trim_end().to_owned())
}

async fn open(args: &GateArgs, list: &GateList, typed: &str, store: &dyn XenStore) -> Result<String, Refused> {
    let uuid: Option<ProtectionId> = typed.parse().ok();
    let entries = list.entries().map_err(refused)?;
    let entry = entries
        .into_iter()
        .find(|entry| entry.name == typed || Some(entry.uuid) == uuid)
        .ok_or_else(|| Refused(format!("{typed} is not guarded here; `remus gate status` shows what is")))?;
    for (folder, how) in [
        ("primary", "`remus unprotect` ends its protection, `remus recover --assume-owner` one that a crash has left"),
        ("backup", "`remus failover` starts the copy, `remus discard` destroys it"),
    ] {
        if args.state_dir.join(folder).join(format!("{}.json", entry.uuid)).exists() {
            return Err(Refused(format!("remusd still decides about {}: {how}", entry.name)));
        }
    }
    // The entry first: an interface that comes up meanwhile must not stay sealed.
    list.release(entry.uuid).map_err(refused)?;
    let mut opened = Vec::new();
    for domid in domains_of(store, &entry).await.map_err(refused)? {
        opened.extend(vifs::open(store, domid).await.map_err(refused)?);
    }
    let seen = if opened.is_empty() { String::new() } else { format!("; opened {}", opened.join(", ")) };
    Ok(format!("{} is guarded here no longer{seen}", entry.name))
}

/// The domains of this host that an entry guards, by UUID or name.
async fn domains_of(store: &dyn XenStore, entry: &Entry) -> Result<Vec<DomId>, StoreError> {
    let mut found = Vec::new();
    for id in store.directory("/local/domain").await? {
        let Ok(domid) = id.parse() else { continue };
        let vm = store.read(&format!("/local/domain/{id}/vm")).await?;
        let name = store.read(&format!("/local/domain/{id}/name")).await?;
        if vm == Some(format!("/vm/{}", entry.uuid)) || name.as_ref() == Some(&entry.name) {
            found.push(DomId(domid));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::xen::FakeStore;

    struct Host {
        dir: tempfile::TempDir,
        store: FakeStore,
    }

    impl Host {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            std::fs::create_dir(dir.path().join("scripts")).unwrap();
            std::fs::write(dir.path().join("scripts/vif-bridge"), "").unwrap();
            Self { dir, store: FakeStore::new() }
        }

        async fn run(&self, command: GateCommand) -> Result<String, String> {
            let places = Places { scripts: self.dir.path().join("scripts"), xl_conf: self.dir.path().join("xl.conf") };
            let args = GateArgs { state_dir: self.dir.path().into(), command };
            run(&args, &places, &self.store).await.map_err(|error| error.to_string())
        }

        fn guard(&self, name: &str) -> Entry {
            let entry = Entry::of(ProtectionId::from_u128(7), name, "{}", "lost to b");
            GateList::new(self.dir.path()).guard(&entry).unwrap();
            entry
        }
    }

    #[tokio::test]
    async fn it_says_how_it_stands() {
        let host = Host::new();
        let text = host.run(GateCommand::Status).await.unwrap();
        assert!(text.starts_with("NOT in place") && text.ends_with("guards nothing"), "{text}");
        host.run(GateCommand::Install).await.unwrap();
        host.guard("g");
        let text = host.run(GateCommand::Status).await.unwrap();
        assert!(text.starts_with("in place: vif-remus-bridge") && text.contains("guards g"), "{text}");
        assert!(text.ends_with("lost to b"), "{text}");
    }

    #[tokio::test]
    async fn it_does_not_go_while_it_is_needed() {
        let host = Host::new();
        host.run(GateCommand::Install).await.unwrap();
        let entry = host.guard("g");
        let error = host.run(GateCommand::Remove).await.unwrap_err();
        assert!(error.contains("guards g"), "{error}");
        GateList::new(host.dir.path()).release(entry.uuid).unwrap();
        let script = "/local/domain/0/backend/vif/3/0/script";
        host.store.write(script, "/etc/xen/scripts/vif-remus-bridge").await.unwrap();
        let text = host.run(GateCommand::Remove).await.unwrap();
        assert!(text.contains("domain 3"), "{text}");
        assert!(host.dir.path().join("scripts/vif-remus").exists());
        host.store.rm(script).await.unwrap();
        host.run(GateCommand::Remove).await.unwrap();
        assert!(!host.dir.path().join("scripts/vif-remus").exists());
    }

    #[tokio::test]
    async fn an_operator_opens_what_nobody_decides_about_any_more() {
        let host = Host::new();
        let open = || GateCommand::Open { domain: "g".into() };
        assert!(host.run(open()).await.unwrap_err().contains("not guarded"));
        let entry = host.guard("g");
        let record = host.dir.path().join("backup").join(format!("{}.json", entry.uuid));
        std::fs::create_dir(record.parent().unwrap()).unwrap();
        std::fs::write(&record, "{}").unwrap();
        assert!(host.run(open()).await.unwrap_err().contains("remus discard"));
        assert_eq!(GateList::new(host.dir.path()).entries().unwrap(), std::slice::from_ref(&entry));
        std::fs::remove_file(record).unwrap();
        assert!(host.run(open()).await.unwrap().contains("no longer"));
        assert_eq!(GateList::new(host.dir.path()).entries().unwrap(), []);
    }
}
