//! Sets a protection up: everything that can fail does so before the guest is touched, and leaves nothing behind.

use std::sync::Arc;
use std::time::Duration;

use devices::script::ScriptedDisk;
use tokio::sync::mpsc;

use super::{Daemon, Primary, monitor, peer_role, resolve};
use crate::api::{ApiError, ErrorCode};
use crate::gate::Entry;
use crate::gate::autostart::{self, Finding, Kept, Xendomains};
use crate::ids::{Generation, Nonce, ProtectionId, SessionKey};
use crate::link::tls::Dial;
use crate::link::{self, LinkError, LinkOptions, PrimaryLink, ProtectOffer, Transport, Welcome};
use crate::ops::DomainRef;
use crate::pair::{HostId, KeyringError, Pairing};
use crate::protect::domain::DomainConfig;
use crate::protect::driver::{self, Parts};
use crate::protect::machine::Outcome;
use crate::protect::options::{Next, OnPrimaryLoss, ProtectOptions, Target, Then};
use crate::protect::ownership::WitnessSource;
use crate::protect::peer::{Outlet, PeerControl, PeerEvent, PeerLost};
use crate::protect::peers::{blackhole::Blackhole, link as link_peer, sleep::Sleep, stock};
use crate::protect::scripts;
use crate::state::{PrimaryRecord, STATE_VERSION};
use crate::witness;
use crate::xen::{DomainInfo, GuestType, LogDirty, Suspender};

/// The two paths to a peer, and what comes from it.
struct Peer {
    outlet: Box<dyn Outlet>,
    control: Arc<dyn PeerControl>,
    events: mpsc::UnboundedReceiver<PeerEvent>,
    self_acknowledging: bool,
    /// What the backup said about itself.
    welcome: Option<Welcome>,
}

fn failed(error: &dyn std::fmt::Display) -> ApiError {
    ApiError::new(ErrorCode::Failed, error.to_string())
}

/// Generations begin at the time in seconds: a reinstalled primary, whose own count is gone, is still newer than what the backup has
/// seen, and so is a stock primary's session, which has nothing but the time.
pub(super) fn generations_from() -> Generation {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    Generation(now.map_or(0, |d| d.as_secs()))
}

/// How to reach a target's `remusd`; `None` for the targets that have none.
#[must_use]
pub fn transport(target: &Target, pairing: &Result<Arc<Pairing>, String>) -> Option<Transport> {
    match target {
        Target::Tls { host, id } => {
            let keyring = pairing.as_ref().map(|pairing| pairing.keyring.clone()).map_err(Clone::clone);
            Some(Transport::Tls(Dial::to(keyring, id.unwrap_or(HostId(ProtectionId::nil())), host.clone())))
        }
        Target::Host { host, ssh } => Some(Transport::Ssh { host: host.clone(), ssh: ssh.clone() }),
        Target::Command(command) => Some(Transport::Command(command.clone())),
        Target::Blackhole | Target::StockReceiver(_) => None,
    }
}

/// What is offered to a backup. Without the domain's figures (it is gone) they are 0, which asks for no memory.
pub(super) fn offer(
    protection: ProtectionId,
    name: &str,
    info: Option<&DomainInfo>,
    options: &ProtectOptions,
) -> ProtectOffer {
    ProtectOffer {
        protection,
        domain: name.to_owned(),
        max_memory_kib: info.map_or(0, |i| i.max_memory / 1024),
        vcpus: info.map_or(1, |i| i.vcpus),
        guest_type: match info.map(|i| i.guest_type) {
            Some(GuestType::Hvm) => link::GuestType::Hvm,
            _ => link::GuestType::Pvh,
        },
        on_primary_loss: match options.on_primary_loss {
            OnPrimaryLoss::Wait => link::OnPrimaryLoss::Wait,
            OnPrimaryLoss::Activate => link::OnPrimaryLoss::Activate,
        },
        detection_ms: u32::try_from(options.detection_ms).unwrap_or(u32::MAX),
        host_id: ProtectionId::nil(),
        witness: None,
        then: None,
        no_monitor: options.no_monitor,
    }
}

pub(super) fn link_options(options: &ProtectOptions) -> LinkOptions {
    LinkOptions {
        ack_deadline: Duration::from_millis(options.ack_deadline_ms),
        ..LinkOptions::for_detection(Duration::from_millis(options.detection_ms))
    }
}

impl Daemon {
    /// Starts protecting a domain.
    ///
    /// # Errors
    /// [`ApiError`] with what is missing and what to do; the guest was not touched then.
    pub async fn protect(
        self: &Arc<Self>,
        typed: &str,
        target: Target,
        options: ProtectOptions,
    ) -> Result<Arc<driver::Handle>, ApiError> {
        #[cfg(test)]
        if let Some(double) = self.double.get() {
            return double(typed);
        }
        options.validate().map_err(|e| ApiError::new(ErrorCode::Invalid, e.to_string()))?;
        let found = resolve::domain(&self.host.hypervisor, &self.host.store, typed).await?;
        let (domain, domid) = (found.domain, found.info.domid);
        let _starting = self.reserve(&domain).await?;
        // Whoever owns it, it is not known to be this host.
        let undecided =
            |r: &PrimaryRecord| r.token != link::Token::Primary || r.handed_over || r.superseded || r.frozen;
        if self.state.primaries().0.iter().any(|record| record.uuid == domain.uuid && undecided(record)) {
            return Err(ApiError::new(
                ErrorCode::Conflict,
                format!(
                    "{0} has still to be recovered from an earlier protection: `remus recover {0}` says why",
                    domain.name
                ),
            ));
        }
        if domain.name.ends_with(crate::stream::handshake::INCOMING_SUFFIX) {
            return Err(ApiError::new(
                ErrorCode::Conflict,
                format!("{} is a copy under restoration, not a guest", domain.name),
            ));
        }
        if let LogDirty::Unsupported(text) = self.host.hypervisor.log_dirty(domid).await.map_err(|e| failed(&e))? {
            return Err(ApiError::new(ErrorCode::Unsupported, text));
        }
        let config = DomainConfig::of(domid).await.map_err(|e| failed(&e))?;
        let unsupported = config.unsupported();
        if !unsupported.is_empty() {
            return Err(ApiError::new(
                ErrorCode::Unsupported,
                format!(
                    "{} has {}, whose state cannot be checkpointed; take it away first",
                    domain.name,
                    unsupported.join(", ")
                ),
            ));
        }
        let target = settle(target, &self.pairing())?;
        self.check_witness(&target, &options).await?;
        let autostart = autostart(&Xendomains::of_host(), &domain, options.manage_autostart)?;
        let devices = super::devices::of(&*self.host.store, domid, found.info.guest_type).await?;
        let scripted = scripted(&target, &options, &config)?;
        let pause_deadline = Duration::from_millis(options.pause_deadline_ms);
        let model = super::devices::model(domid, found.info.guest_type, &self.host.store, pause_deadline)
            .await
            .map_err(|e| failed(&e))?;
        let suspender = Suspender::new(domid, self.host.hypervisor.clone(), self.host.store.clone())
            .await
            .map_err(|e| failed(&e))?;
        let guard = (self.host.guard)(domid).map_err(|e| failed(&e))?;
        let generation = self.state.next_generation(domain.uuid, generations_from()).map_err(|e| failed(&e))?;
        let key = SessionKey { generation, nonce: Nonce::random() };

        let offer = ProtectOffer {
            host_id: self.state.host().map_err(|e| failed(&e))?.id.0,
            witness: options.witness.clone(),
            then: next_protection(&options),
            ..offer(domain.uuid, &domain.name, Some(&found.info), &options)
        };
        let peer = connect(&target, &self.pairing(), key, offer, &options, (&config, &scripted)).await?;

        let witness = match self.open_witness(&options, domain.uuid, generation, peer.welcome.as_ref()) {
            Ok(witness) => witness,
            Err(error) => {
                peer.control.stop(&crate::protect::machine::StopWhy::Planned).await;
                peer.control.close().await;
                return Err(error);
            }
        };
        let (net_send, net_events) = mpsc::channel(256);
        let (disk_send, disk_news) = mpsc::channel(64);
        let (teller, output) = devices::output_signal();
        let mut set = super::devices::set(&options, &target, &self.host.store, &scripted, net_send, disk_send, teller);
        if let Err(error) = set.setup(devices).await {
            peer.control.stop(&crate::protect::machine::StopWhy::Planned).await;
            peer.control.close().await;
            return Err(ApiError::new(ErrorCode::Unsupported, error.to_string()));
        }
        let record = PrimaryRecord {
            version: STATE_VERSION,
            uuid: domain.uuid,
            name: domain.name.clone(),
            domid,
            generation,
            nonce: key.nonce,
            armed: false,
            superseded: false,
            token: link::Token::Primary,
            handed_over: false,
            frozen: false,
            target: target.clone(),
            options: options.clone(),
            vifs: super::devices::vifs(&set),
            devices: set.records().iter().filter_map(|r| serde_json::to_value(r).ok()).collect(),
            config: config.json.clone(),
            monitor: self.monitors.lock().await.get(&domain.uuid).is_some_and(|task| !task.is_finished()),
            helper: None,
        };
        let entry = Entry::of(
            domain.uuid,
            &domain.name,
            &config.json,
            "protected from here: whoever starts it again must prove that it may",
        );
        let guarded = self.state.gate().guard(&entry).map_err(|error| failed(&error));
        let taken = guarded.and_then(|()| self.take_autostart(domain.uuid, &autostart));
        let kept = taken.and_then(|()| self.state.put_primary(&record).map_err(|error| failed(&error)));
        if let Err(error) = kept {
            let _ = self.state.put_autostart_back(domain.uuid);
            let _ = self.state.gate().release(domain.uuid);
            set.teardown(devices::Ending::Release).await;
            peer.control.stop(&crate::protect::machine::StopWhy::Planned).await;
            peer.control.close().await;
            return Err(error);
        }
        for disk in super::devices::mirrored(&record) {
            self.disks.follow(&disk, domain.clone());
        }
        self.end_monitor(domain.uuid).await;
        let monitor_record =
            monitor::MonitorRecord { uuid: domain.uuid, domid, name: domain.name.clone(), config: config.json.clone() };
        let (again_target, again_options) = (target.clone(), options.clone());
        let parts = Parts {
            domain: domain.clone(),
            domid,
            model,
            config,
            options,
            target: target.clone(),
            hypervisor: self.host.hypervisor.clone(),
            store: self.host.store.clone(),
            pages: self.host.pages.clone(),
            guard,
            devices: set,
            control: peer.control,
            outlet: Some(peer.outlet),
            peer_events: peer.events,
            self_acknowledging: peer.self_acknowledging,
            net_events,
            output,
            disk_news,
            state: self.state.clone(),
            record,
            log: self.log.clone(),
            toolstack: self.host.toolstack.clone(),
            helper: self.host.helper.clone(),
            witness,
        };
        let unsafe_target = parts.self_acknowledging;
        let witness = parts.witness.is_some();
        let handle = Arc::new(driver::start(parts, suspender));
        let uuid = domain.uuid;
        // Also one that was begun by policy and not by an operator.
        let watched = super::observe::observe(self.clone(), domain.clone(), again_options.clone(), handle.clone());
        tokio::spawn(watched);
        let resync = (domain.clone(), again_target.clone(), again_options.clone());
        let primary = Primary { domain, target, generation, unsafe_target, witness, handle: handle.clone() };
        self.primaries.lock().await.insert(uuid, primary);
        let again = (again_target, again_options);
        let name = monitor_record.name.clone();
        let (daemon, watched) = (self.clone(), handle.clone());
        tokio::spawn(async move {
            let outcome = watched.ended().await;
            daemon.after(monitor_record, &watched, &outcome).await;
            let differs = matches!(&outcome, Outcome::Alone(text) if text.contains(crate::audit::DIFFERS));
            if differs {
                daemon.resync(resync);
            } else if matches!(outcome, Outcome::Alone(_)) {
                daemon.reprotect_by_policy(uuid, &name, &again.0, &again.1);
            }
        });
        Ok(handle)
    }
}

impl Daemon {
    /// Refuses a witness that could not decide: one on either host, or with a peer that knows nothing of it.
    async fn check_witness(&self, target: &Target, options: &ProtectOptions) -> Result<(), ApiError> {
        let Some(spec) = &options.witness else { return Ok(()) };
        let peer = match target {
            Target::Host { host, .. } => host.rsplit_once('@').map_or(host.as_str(), |(_, host)| host),
            Target::Tls { host, .. } => host,
            // Nobody knows where the command leads to; this host can still be told.
            Target::Command(_) => "127.0.0.1",
            Target::Blackhole | Target::StockReceiver(_) => {
                let text = "--witness: the other side is no remusd and would not ask it";
                return Err(ApiError::new(ErrorCode::Invalid, text));
            }
        };
        self.witnesses.check(spec, peer).await.map_err(|text| ApiError::new(ErrorCode::Invalid, text))
    }

    fn open_witness(
        &self,
        options: &ProtectOptions,
        uuid: ProtectionId,
        at_least: Generation,
        welcome: Option<&Welcome>,
    ) -> Result<Option<driver::Witness>, ApiError> {
        let (Some(spec), Some(welcome)) = (&options.witness, welcome) else { return Ok(None) };
        let opened = self.witnesses.open(spec, uuid).map_err(|text| ApiError::new(ErrorCode::Failed, text))?;
        let peer = witness::Host { id: witness::HostId(welcome.host_id), name: welcome.host.clone() };
        if peer.id == opened.keeper.me().id {
            return Err(ApiError::new(
                ErrorCode::Conflict,
                "both hosts have the same identity: one was made from a copy of the other's disk. Remove `host-id` from the state \
                 folder of one of them",
            ));
        }
        Ok(Some(driver::Witness { opened, peer, peer_has_seen: welcome.knows_record, at_least }))
    }
}

/// What the backup does once it runs the guest, as told in the offer: protect it in turn.
fn next_protection(options: &ProtectOptions) -> Option<String> {
    let host = match &options.then {
        Then::Nothing => return None,
        Then::Back => link::handshake::host_name(),
        Then::To(host) => host.clone(),
    };
    // What comes after that goes back to where it came from.
    let options = ProtectOptions { then: Then::Back, ..options.clone() };
    serde_json::to_string(&Next { target: Target::Host { host, ssh: None }, options }).ok()
}

/// What xendomains boots of this domain, if that may be taken away; refused otherwise (hazard F4).
fn autostart(xendomains: &Xendomains, domain: &DomainRef, manage: bool) -> Result<Vec<Kept>, ApiError> {
    let mut kept = Vec::new();
    for finding in autostart::findings(xendomains, &domain.name, domain.uuid) {
        match finding {
            Finding::Autostart { path } if manage => {
                let entry = Kept::of(&path).map_err(|error| failed(&format!("{}: {error}", path.display())))?;
                kept.push(entry);
            }
            finding => return Err(ApiError::new(ErrorCode::Conflict, format!("{}: {finding}", domain.name))),
        }
    }
    Ok(kept)
}

/// Decides how to reach a host, for this protection and its recovery: by TLS if it is paired and nobody asked for ssh.
fn settle(target: Target, pairing: &Result<Arc<Pairing>, String>) -> Result<Target, ApiError> {
    let paired = |typed: &str| pairing.as_ref().ok().and_then(|pairing| pairing.keyring.find(typed));
    match target {
        Target::Tls { host, .. } => match (paired(&host), pairing) {
            (Some(peer), _) => Ok(Target::Tls { host: peer.name, id: Some(peer.id) }),
            (None, Ok(_)) => Err(KeyringError::NotPaired(host).into()),
            (None, Err(why)) => Err(ApiError::new(ErrorCode::Failed, why.clone())),
        },
        Target::Host { host, ssh: None } => {
            match paired(host.rsplit_once('@').map_or(host.as_str(), |(_, host)| host)) {
                Some(peer) => Ok(Target::Tls { host: peer.name, id: Some(peer.id) }),
                None => Ok(Target::Host { host, ssh: None }),
            }
        }
        other => Ok(other),
    }
}

impl Daemon {
    /// Takes the entries away, once they are kept.
    fn take_autostart(&self, uuid: ProtectionId, entries: &[Kept]) -> Result<(), ApiError> {
        if entries.is_empty() {
            return Ok(());
        }
        self.state.keep_autostart(uuid, entries).map_err(|error| failed(&error))?;
        for entry in entries {
            entry.remove().map_err(|error| failed(&format!("{}: {error}", entry.path.display())))?;
        }
        Ok(())
    }
}

/// The disks that the options give to programs, which the other host has to run too.
fn scripted(target: &Target, options: &ProtectOptions, config: &DomainConfig) -> Result<Vec<ScriptedDisk>, ApiError> {
    let invalid = |text: String| ApiError::new(ErrorCode::Invalid, text);
    if matches!(target, Target::StockReceiver(_)) && !options.disk_scripts.is_empty() {
        return Err(invalid("--disk: the other side is no remusd and would not run the program".into()));
    }
    scripts::scripted(&config.json, &options.disk_scripts).map_err(invalid)
}

async fn connect(
    target: &Target,
    pairing: &Result<Arc<Pairing>, String>,
    key: SessionKey,
    offer: ProtectOffer,
    options: &ProtectOptions,
    (config, scripted): (&DomainConfig, &[ScriptedDisk]),
) -> Result<Peer, ApiError> {
    let (send, events) = mpsc::unbounded_channel();
    let protection = offer.protection;
    let peer_error = |PeerLost(text): PeerLost| ApiError::new(ErrorCode::Peer, text);
    if let Some(transport) = transport(target, pairing) {
        let sent = scripts::add(&config.json, scripted).map_err(|text| failed(&text))?;
        let (sender, link_events) =
            PrimaryLink::connect(&transport, key, offer, &link_options(options)).await.map_err(|e| match e {
                LinkError::Superseded { .. } => ApiError::new(
                    ErrorCode::Conflict,
                    format!("{e}. Two copies may be live: find out which one is right and destroy the other"),
                ),
                other => ApiError::new(ErrorCode::Peer, other.to_string()),
            })?;
        sender.config(bytes::Bytes::from(sent)).await.map_err(|e| ApiError::new(ErrorCode::Peer, e.to_string()))?;
        let detection = Duration::from_millis(options.detection_ms);
        let sleep = Sleep::new(detection, std::time::Instant::now());
        let name = target.label().to_string();
        let asked =
            async move || peer_role::whether_it_runs(&name, detection, || peer_role::ask(&transport, protection)).await;
        tokio::spawn(link_peer::relay(link_events, send, sleep, asked));
        let welcome = sender.peer().clone();
        let control = Arc::new(link_peer::LinkControl::new(sender.clone()));
        return Ok(Peer {
            outlet: Box::new(link_peer::LinkOutlet::new(sender)),
            control,
            events,
            self_acknowledging: false,
            welcome: Some(welcome),
        });
    }
    let (outlet, control): (Box<dyn Outlet>, Arc<dyn PeerControl>) = match target {
        Target::StockReceiver(command) => {
            let (outlet, control) = stock::connect(command, config.json.clone()).await.map_err(peer_error)?;
            (Box::new(outlet), Arc::new(control))
        }
        _ => (Box::new(Blackhole), Arc::new(Blackhole)),
    };
    // Nothing ever comes from such a peer, which is not its end: the sender lives as long as the process.
    tokio::spawn(async move {
        send.closed().await;
    });
    Ok(Peer { outlet, control, events, self_acknowledging: true, welcome: None })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::tls::ListenState;
    use crate::pair::{KeyPair, Keyring};

    #[test]
    fn what_xendomains_boots_is_refused_unless_it_is_ours_to_manage() {
        let dir = tempfile::tempdir().unwrap();
        let host = Xendomains { auto: Some(dir.path().into()), save: Some(dir.path().join("save")), restore: true };
        let domain = DomainRef { domid: None, name: "web".into(), uuid: ProtectionId::from_u128(5) };
        assert_eq!(autostart(&host, &domain, false).unwrap(), []);
        std::fs::write(dir.path().join("web.cfg"), "name = 'web'").unwrap();
        let error = autostart(&host, &domain, false).unwrap_err();
        assert_eq!(error.code, ErrorCode::Conflict);
        assert!(error.to_string().contains("--manage-autostart"), "{error}");
        assert_eq!(autostart(&host, &domain, true).unwrap().len(), 1);
        std::fs::create_dir(dir.path().join("save")).unwrap();
        std::fs::write(dir.path().join("save/web"), "").unwrap();
        assert!(autostart(&host, &domain, true).is_err(), "an old image is nobody's to manage");
    }

    #[tokio::test]
    async fn a_paired_host_is_reached_by_tls_unless_ssh_was_asked_for() {
        let folder = tempfile::tempdir().unwrap();
        let keyring = Keyring::open(&folder.path().join("tls"), HostId(uuid::Uuid::new_v4())).unwrap();
        let id = HostId(ProtectionId::from_u128(4));
        keyring.pair(id, KeyPair::generate(id).unwrap().certificate, "hostb", "10.0.0.2", 7).unwrap();
        let (_, listening) = tokio::sync::watch::channel(ListenState::Off);
        let pairing = Ok(Arc::new(Pairing { keyring: keyring.clone(), port: 7, listening }));
        let host = |host: &str, ssh: Option<&str>| Target::Host { host: host.into(), ssh: ssh.map(Into::into) };
        let tls = Target::Tls { host: "hostb".into(), id: Some(id) };
        for (typed, settled) in [
            (host("hostb", None), tls.clone()),
            (host("root@hostb", None), tls.clone()),
            (host("10.0.0.2", None), tls.clone()),
            (Target::Tls { host: "hostb".into(), id: None }, tls.clone()),
            (host("hostb", Some("ssh")), host("hostb", Some("ssh"))),
            (host("hostc", None), host("hostc", None)),
            (Target::Command("x".into()), Target::Command("x".into())),
        ] {
            assert_eq!(settle(typed.clone(), &pairing).unwrap(), settled, "{typed:?}");
        }
        let error = settle(Target::Tls { host: "hostc".into(), id: None }, &pairing).unwrap_err();
        assert_eq!(error.code, ErrorCode::NotFound);

        // Without keys: ssh, or an error, but never silently something else; recovery asks and gets no answer.
        let broken = Err("identity.json is open to others".to_owned());
        assert_eq!(settle(host("hostb", None), &broken).unwrap(), host("hostb", None));
        assert!(settle(Target::Tls { host: "hostb".into(), id: None }, &broken).is_err());
        let error = transport(&tls, &broken).unwrap().open().await.unwrap_err();
        assert!(error.to_string().contains("open to others"), "{error}");

        // Another host under the same name is not the one that holds the copy.
        keyring.unpair("hostb").unwrap();
        let other = HostId(ProtectionId::from_u128(5));
        keyring.pair(other, KeyPair::generate(other).unwrap().certificate, "hostb", "10.0.0.2", 7).unwrap();
        let error = transport(&tls, &pairing).unwrap().open().await.unwrap_err();
        assert!(error.to_string().contains("not paired"), "{error}");
    }
}
