//! Against real etcd servers (Debian's etcd-server), started here on free ports in temporary folders. Skipped, and said so, where
//! etcd is not installed.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use etcd_client::{ConnectOptions, Permission};

use super::client::{CasReply, Client, Effect, Input, Outcome, ReadError};
use super::config::EtcdConfig;
use super::etcd::EtcdStore;
use super::keeper::{Answer, Keeper, KeeperEvent};
use super::record::{Record, RecordKey, RecordState as S, Watermark};
use super::rules::{Intent, Refusal};
use super::rules_tests::{DOMAIN, attempt, host, nonce, record};
use super::store::WitnessStore;
use super::test_proxy::Proxy;
use crate::ids::{Generation, ProtectionId};
use crate::ops::Backoff;
use crate::state::StateDir;

const LIMIT: Duration = Duration::from_secs(30);

/// Whether etcd is here; says so if not.
fn have_etcd() -> bool {
    let found = Command::new("etcd").arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok();
    if !found {
        eprintln!("SKIPPED: etcd is not installed (Debian: etcd-server)");
    }
    found
}

fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// A server; killed when dropped.
struct Etcd {
    child: Option<Child>,
    args: Vec<String>,
    url: String,
}

impl Etcd {
    fn start(dir: &Path, more: &[&str]) -> Self {
        let (client, peer) = (free_port(), free_port());
        let scheme = if more.contains(&"--cert-file") { "https" } else { "http" };
        let cluster = format!("n0=http://127.0.0.1:{peer}");
        Self::member(
            dir,
            "n0",
            &format!("{scheme}://127.0.0.1:{client}"),
            &format!("http://127.0.0.1:{peer}"),
            &cluster,
            more,
        )
    }

    fn member(dir: &Path, name: &str, url: &str, peer: &str, cluster: &str, more: &[&str]) -> Self {
        let data = dir.join(name);
        let mut args: Vec<String> = [
            ("--name", name),
            ("--data-dir", data.to_str().unwrap()),
            ("--listen-client-urls", url),
            ("--advertise-client-urls", url),
            ("--listen-peer-urls", peer),
            ("--initial-advertise-peer-urls", peer),
            ("--initial-cluster", cluster),
            ("--log-level", "error"),
        ]
        .into_iter()
        .flat_map(|(k, v)| [k.to_owned(), v.to_owned()])
        .collect();
        args.extend(more.iter().map(|s| (*s).to_owned()));
        let mut etcd = Self { child: None, args, url: url.into() };
        etcd.run();
        etcd
    }

    fn run(&mut self) {
        let mut command = Command::new("etcd");
        command.args(&self.args).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        self.child = Some(command.spawn().unwrap());
    }

    fn stop(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.stop();
    }
}

fn config(urls: &[&str]) -> EtcdConfig {
    let json = serde_json::json!({ "endpoints": urls, "timeout_ms": 1500 });
    serde_json::from_value(json).unwrap()
}

fn store(url: &str) -> EtcdStore {
    EtcdStore::new(&config(&[url])).unwrap()
}

async fn ready(store: &EtcdStore) {
    let mut backoff = Backoff::new(Duration::from_millis(20), Duration::from_millis(500), LIMIT).unwrap();
    while let Err(why) = store.probe().await {
        backoff.wait().await.unwrap_or_else(|_| panic!("etcd did not start: {why}"));
    }
}

/// Runs an intent to its end; unknown outcomes are read again.
async fn run(client: &mut Client, store: &EtcdStore, intent: Intent) -> Outcome {
    let mut effects = client.start(intent, super::Attempt::random()).unwrap();
    loop {
        let mut input = None;
        for effect in effects {
            match effect {
                Effect::Read(r) => input = Some(Input::Read(r, store.read(DOMAIN).await)),
                Effect::Cas { request, expected, new } => {
                    input = Some(Input::Cas(request, store.cas(DOMAIN, &expected, &new).await));
                }
                Effect::Wait { request, .. } => input = Some(Input::Retry(request)),
                Effect::Done(outcome) => return outcome,
                Effect::SaveWatermark(_) | Effect::Alarm(_) => {}
            }
        }
        effects = client.on(input.unwrap());
    }
}

fn client(n: u128) -> Client {
    Client::new(host(n, &format!("h{n}")), DOMAIN, Watermark::default())
}

fn arm(n: u128) -> Intent {
    Intent::Arm { at_least: Generation(1), nonce: nonce(n), peer: host(2, "h2"), peer_has_seen: false }
}

fn won(outcome: Outcome) -> Record {
    match outcome {
        Outcome::Won(r) => *r,
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn arm_and_race_for_the_claim() {
    if !have_etcd() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let etcd = Etcd::start(dir.path(), &[]);
    ready(&store(&etcd.url)).await;
    let keeper = |name: &str| {
        let state = StateDir::open(dir.path().join(name)).unwrap();
        Keeper::start(DOMAIN, Arc::new(store(&etcd.url)), &state, None).unwrap().0
    };
    let (a, b) = (keeper("a"), keeper("b"));
    let settled = |answer| match answer {
        Answer::Settled(outcome) => outcome,
        Answer::Unknown(why) => panic!("{why}"),
    };
    for round in 0..20 {
        let armed = won(settled(a.arm(b.me().clone(), Generation(1), round > 0, LIMIT).await));
        let key = armed.key();
        won(settled(b.accept(key, LIMIT).await));
        let (x, y) = tokio::join!(a.claim(key, LIMIT), b.claim(key, LIMIT));
        let winner = match (settled(x), settled(y)) {
            (Outcome::Won(_), Outcome::Lost(r)) | (Outcome::Lost(r), Outcome::Won(_)) => r,
            other => panic!("{other:?}"),
        };
        if winner.owner.is(b.me()) {
            won(settled(b.forfeit(key, LIMIT).await));
            won(settled(a.claim(key, LIMIT).await));
        }
        won(settled(a.activate(key, LIMIT).await));
        let lost = settled(b.claim(key, LIMIT).await);
        assert!(matches!(&lost, Outcome::Lost(r) if r.state == S::Active), "{lost:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_swap_compares_revision_and_value_and_garbage_is_refused() {
    if !have_etcd() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let etcd = Etcd::start(dir.path(), &[]);
    let store = store(&etcd.url);
    ready(&store).await;
    let absent = store.read(DOMAIN).await.unwrap();
    assert_eq!((&absent.record, absent.position.modified), (&None, 0));
    let armed = record(S::Armed);
    let CasReply::Applied(position) = store.cas(DOMAIN, &absent, &armed).await else { panic!() };
    let there = store.read(DOMAIN).await.unwrap();
    assert_eq!((there.record.as_ref(), &there.position), (Some(&armed), &position));
    assert_eq!(store.cas(DOMAIN, &absent, &record(S::Stopped)).await, CasReply::Conflict, "it exists");
    let mut other_value = there.clone();
    other_value.record = Some(Record { attempt: attempt(9), ..armed.clone() });
    assert_eq!(
        store.cas(DOMAIN, &other_value, &record(S::Stopped)).await,
        CasReply::Conflict,
        "the whole value counts"
    );
    let mut other_revision = there.clone();
    other_revision.position.modified += 1;
    assert_eq!(
        store.cas(DOMAIN, &other_revision, &record(S::Stopped)).await,
        CasReply::Conflict,
        "the revision counts"
    );
    let mut raw = etcd_client::Client::connect([&etcd.url], None).await.unwrap();
    raw.put(format!("/remusd/witness/{DOMAIN}"), "by hand", None).await.unwrap();
    assert!(matches!(store.read(DOMAIN).await, Err(ReadError::Unreadable(_))));
    assert_eq!(store.read(ProtectionId::from_u128(1)).await.unwrap().record, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_reply_is_unknown_and_then_mine_and_a_lost_request_is_sent_again() {
    if !have_etcd() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let etcd = Etcd::start(dir.path(), &[]);
    let direct = store(&etcd.url);
    ready(&direct).await;
    let key = won(run(&mut client(1), &direct, arm(1)).await).key();
    for (mute_replies, applied) in [(true, true), (false, false)] {
        let proxy = Proxy::start(etcd.url.strip_prefix("http://").unwrap()).await;
        let through = store(&proxy.url());
        let mut b = client(2);
        let me = attempt(if applied { 50 } else { 51 });
        let intent = if applied { Intent::Claim(key) } else { Intent::Forfeit(key) };
        let [Effect::Read(r)] = b.start(intent, me).unwrap()[..] else { panic!() };
        let effects = b.on(Input::Read(r, through.read(DOMAIN).await));
        let [Effect::Cas { request, expected, new }] = &effects[..] else { panic!("{effects:?}") };
        proxy.mute(mute_replies, !mute_replies);
        let reply = through.cas(DOMAIN, expected, new).await;
        assert!(matches!(reply, CasReply::Unknown(_)), "{reply:?}");
        assert_eq!(direct.read(DOMAIN).await.unwrap().record.unwrap().attempt == me, applied);
        proxy.mute(false, false);
        let mut effects = b.on(Input::Cas(*request, reply));
        let outcome = loop {
            effects = match &effects[..] {
                [Effect::Read(r)] => b.on(Input::Read(*r, through.read(DOMAIN).await)),
                [Effect::Wait { request, .. }] => b.on(Input::Retry(*request)),
                [Effect::Cas { request, expected, new }] => {
                    assert!(!applied, "what was applied is not sent again");
                    b.on(Input::Cas(*request, through.cas(DOMAIN, expected, new).await))
                }
                [.., Effect::Done(outcome)] => break outcome.clone(),
                other => panic!("{other:?}"),
            };
        };
        assert_eq!(won(outcome).attempt, me);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_witness_that_swallows_everything_is_unknown_until_it_is_back() {
    if !have_etcd() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let etcd = Etcd::start(dir.path(), &[]);
    let proxy = Proxy::start(etcd.url.strip_prefix("http://").unwrap()).await;
    ready(&store(&proxy.url())).await;
    let state = StateDir::open(dir.path().join("a")).unwrap();
    let (a, mut events) = Keeper::start(DOMAIN, Arc::new(store(&proxy.url())), &state, None).unwrap();
    let Answer::Settled(armed) = a.arm(host(2, "h2"), Generation(1), false, LIMIT).await else { panic!() };
    proxy.mute(true, true);
    let answer = a.claim(won(armed).key(), Duration::from_secs(3)).await;
    assert!(matches!(&answer, Answer::Unknown(why) if why.contains("no answer within")), "{answer:?}");
    proxy.mute(false, false);
    let late = tokio::time::timeout(LIMIT, events.recv()).await.unwrap().unwrap();
    assert!(matches!(late, KeeperEvent::Late { outcome: Outcome::Won(_), .. }), "{late:?}");
}

/// Copies a data folder, as a backup of the machine would.
fn copy(from: &Path, to: &Path) {
    assert!(Command::new("cp").arg("-a").arg(from).arg(to).status().unwrap().success());
}

#[tokio::test(flavor = "multi_thread")]
async fn restored_from_a_backup_wiped_or_replaced_it_is_refused() {
    if !have_etcd() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut etcd = Etcd::start(dir.path(), &[]);
    let store = store(&etcd.url);
    ready(&store).await;
    let (data, backup, newest) = (dir.path().join("n0"), dir.path().join("backup"), dir.path().join("newest"));
    let (mut a, mut b) = (client(1), client(2));
    let key = won(run(&mut a, &store, arm(1)).await).key();
    won(run(&mut b, &store, Intent::Accept(key)).await);
    etcd.stop();
    copy(&data, &backup);
    etcd.run();
    ready(&store).await;
    won(run(&mut a, &store, Intent::Claim(key)).await);
    won(run(&mut a, &store, Intent::Activate(key)).await);
    let seen = run(&mut b, &store, Intent::Look).await;
    assert!(matches!(&seen, Outcome::Seen(r) if r.state == S::Active), "a restart is no rollback: {seen:?}");
    etcd.stop();
    copy(&data, &newest);

    let refused = async |client: &Client, intent: Intent| match run(&mut client.clone(), &store, intent).await {
        Outcome::Refused(refusal) => refusal,
        other => panic!("{other:?}"),
    };
    let again = || Intent::Arm { at_least: Generation(1), nonce: nonce(3), peer: host(2, "h2"), peer_has_seen: false };
    // The armed record of the backup would let both hosts claim.
    std::fs::remove_dir_all(&data).unwrap();
    copy(&backup, &data);
    etcd.run();
    ready(&store).await;
    let there = store.read(DOMAIN).await.unwrap().record.unwrap();
    assert_eq!((there.state, there.key()), (S::Armed, key), "the trap is set");
    assert!(matches!(refused(&b, Intent::Claim(key)).await, Refusal::RolledBack(_)));
    assert!(matches!(refused(&a, again()).await, Refusal::RolledBack(_)));
    // Other writes bring the store's revision past what was seen; the record's own still tells.
    let mut raw = etcd_client::Client::connect([&etcd.url], None).await.unwrap();
    for _ in 0..20 {
        raw.put("something else", "x", None).await.unwrap();
    }
    assert!(
        matches!(refused(&b, Intent::Claim(key)).await, Refusal::RolledBack(why) if why.contains("record's revision"))
    );
    // Wiped: etcd makes the same cluster id from the same settings.
    etcd.stop();
    std::fs::remove_dir_all(&data).unwrap();
    etcd.run();
    ready(&store).await;
    for client in [&a, &b] {
        assert!(matches!(refused(client, Intent::Claim(key)).await, Refusal::RolledBack(_)));
        assert!(matches!(refused(client, again()).await, Refusal::RolledBack(_)));
    }
    let mut raw = etcd_client::Client::connect([&etcd.url], None).await.unwrap();
    for _ in 0..20 {
        raw.put("something else", "x", None).await.unwrap();
    }
    assert_eq!(refused(&b, Intent::Claim(key)).await, Refusal::Absent);
    assert_eq!(refused(&a, again()).await, Refusal::Absent);
    // Another cluster.
    etcd.stop();
    std::fs::remove_dir_all(&data).unwrap();
    let plain = etcd.args.clone();
    etcd.args.extend(["--initial-cluster-token".into(), "another".into()]);
    etcd.run();
    ready(&store).await;
    assert!(matches!(refused(&b, Intent::Claim(key)).await, Refusal::OtherStore { .. }));
    assert!(matches!(refused(&a, again()).await, Refusal::OtherStore { .. }));
    // The real one is back: all is well.
    etcd.stop();
    std::fs::remove_dir_all(&data).unwrap();
    copy(&newest, &data);
    etcd.args = plain;
    etcd.run();
    ready(&store).await;
    won(run(&mut a, &store, again()).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_survives_the_loss_of_its_leader_and_is_unknown_without_a_quorum() {
    if !have_etcd() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let names = ["n0", "n1", "n2"];
    let urls = names.map(|_| format!("http://127.0.0.1:{}", free_port()));
    let peers = names.map(|_| format!("http://127.0.0.1:{}", free_port()));
    let cluster = names.iter().zip(&peers).map(|(n, p)| format!("{n}={p}")).collect::<Vec<_>>().join(",");
    let mut members: Vec<_> =
        (0..3).map(|n| Etcd::member(dir.path(), names[n], &urls[n], &peers[n], &cluster, &[])).collect();
    let all: Vec<_> = urls.iter().map(String::as_str).collect();
    let store = Arc::new(EtcdStore::new(&config(&all)).unwrap());
    ready(&store).await;
    let state = StateDir::open(dir.path().join("a")).unwrap();
    let (a, _events) = Keeper::start(DOMAIN, store.clone(), &state, None).unwrap();
    let settled = |answer| match answer {
        Answer::Settled(outcome) => won(outcome),
        Answer::Unknown(why) => panic!("{why}"),
    };
    let key: RecordKey = settled(a.arm(host(2, "h2"), Generation(1), false, LIMIT).await).key();
    let mut leader = None;
    for (n, url) in urls.iter().enumerate() {
        let mut raw = etcd_client::Client::connect([url], None).await.unwrap();
        let status = raw.status().await.unwrap();
        if status.header().unwrap().member_id() == status.leader() {
            leader = Some(n);
        }
    }
    let leader = leader.unwrap();
    members[leader].stop();
    settled(a.claim(key, LIMIT).await);
    members[(leader + 1) % 3].stop();
    let answer = a.activate(key, Duration::from_secs(4)).await;
    assert!(matches!(answer, Answer::Unknown(_)), "no quorum: {answer:?}");
    assert!(store.probe().await.is_err(), "a probe is linearizable too");
    members[leader].run();
    ready(&store).await;
    settled(a.activate(key, LIMIT).await);
}

/// PEM files of an authority, and of certificates that it signed for `127.0.0.1`.
fn certificates(dir: &Path, names: &[&str]) {
    use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
    let write = |name: String, text: String| std::fs::write(dir.join(name), text).unwrap();
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(vec![]).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    write("ca.pem".into(), params.self_signed(&key).unwrap().pem());
    let issuer = Issuer::new(params, key);
    for name in names {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec!["127.0.0.1".into()]).unwrap();
        write(format!("{name}.pem"), params.signed_by(&key, &issuer).unwrap().pem());
        write(format!("{name}.key"), key.serialize_pem());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_with_client_certificates() {
    if !have_etcd() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str| dir.path().join(name);
    certificates(dir.path(), &["server", "client"]);
    let strangers = tempfile::tempdir().unwrap();
    certificates(strangers.path(), &["client"]);
    let text = |name: &str| file(name).to_str().unwrap().to_owned();
    let (cert, key, ca) = (text("server.pem"), text("server.key"), text("ca.pem"));
    let flags = ["--cert-file", &cert, "--key-file", &key, "--client-cert-auth", "--trusted-ca-file", &ca];
    let etcd = Etcd::start(dir.path(), &flags);
    let base = config(&[&etcd.url]);
    let good =
        EtcdConfig { ca: Some(file("ca.pem")), cert: Some(file("client.pem")), key: Some(file("client.key")), ..base };
    let store = EtcdStore::new(&good).unwrap();
    ready(&store).await;
    won(run(&mut client(1), &store, arm(1)).await);
    let stranger = strangers.path();
    let (no_cert, no_key) = (None, None);
    for (what, bad) in [
        ("no client certificate", EtcdConfig { cert: no_cert, key: no_key, ..good.clone() }),
        ("a server of another authority", EtcdConfig { ca: Some(stranger.join("ca.pem")), ..good.clone() }),
        (
            "a client of another authority",
            EtcdConfig {
                cert: Some(stranger.join("client.pem")),
                key: Some(stranger.join("client.key")),
                ..good.clone()
            },
        ),
    ] {
        let error = EtcdStore::new(&bad).unwrap().probe().await.unwrap_err();
        eprintln!("{what}: {error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn users_and_passwords() {
    if !have_etcd() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let etcd = Etcd::start(dir.path(), &["--auth-token-ttl", "1"]);
    ready(&store(&etcd.url)).await;
    let mut raw = etcd_client::Client::connect([&etcd.url], None).await.unwrap();
    raw.role_add("remusd").await.unwrap();
    let all = Permission::read_write("/remusd/witness/").with_prefix();
    raw.role_grant_permission("remusd", all).await.unwrap();
    for (user, password, role) in [("root", "r", "root"), ("remusd", "sesame", "remusd")] {
        if role == "root" {
            raw.role_add("root").await.unwrap();
        }
        raw.user_add(user, password, None).await.unwrap();
        raw.user_grant_role(user, role).await.unwrap();
    }
    raw.auth_enable().await.unwrap();
    let secret = dir.path().join("password");
    std::fs::write(&secret, "sesame\n").unwrap();
    let good = EtcdConfig { user: Some("remusd".into()), password_file: Some(secret.clone()), ..config(&[&etcd.url]) };
    let with_user = EtcdStore::new(&good).unwrap();
    with_user.probe().await.unwrap();
    let mut a = client(1);
    let key = won(run(&mut a, &with_user, arm(1)).await).key();
    assert!(store(&etcd.url).probe().await.is_err(), "without a user");
    let elsewhere = EtcdConfig { prefix: "/other/".into(), ..good.clone() };
    assert!(EtcdStore::new(&elsewhere).unwrap().probe().await.unwrap_err().contains("permission denied"));
    std::fs::write(&secret, "wrong").unwrap();
    assert!(EtcdStore::new(&good).unwrap().probe().await.unwrap_err().contains("authentication failed"));
    // The token goes out of use: it is fetched anew.
    let root = ConnectOptions::new().with_user("root", "r");
    let mut raw = etcd_client::Client::connect([&etcd.url], Some(root)).await.unwrap();
    tokio::time::sleep(Duration::from_secs(4)).await;
    won(run(&mut a, &with_user, Intent::Claim(key)).await);
    raw.get("x", None).await.expect_err("its token is out of use, so the one above was renewed");
}
