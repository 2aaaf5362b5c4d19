//! The sources of every crate: no two files import each other, in a circle of any length; an `impl T` outside of T's file counts as an
//! import of both. Functions, structs, traits and types have limits. Tests inside of the sources are exempt.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use syn::spanned::Spanned;
use syn::visit::{self, Visit};

/// Lines of a function, its signature included.
const LINES: usize = 60;
/// Fields of a struct.
const FIELDS: usize = 15;
/// Methods of a trait.
const METHODS: usize = 15;

/// Names of a module, from the root of its crate.
type Module = Vec<String>;

/// An item: its file, its name, its size.
type Measured = (PathBuf, String, usize);

/// The files of a crate.
#[derive(Default)]
struct Crate {
    /// The file of each module, modules within a file included.
    modules: BTreeMap<Module, PathBuf>,
    /// What a module makes known under another name or place.
    exports: BTreeMap<(Module, String), Module>,
    /// Paths that are named in a module.
    named: Vec<(Module, Module)>,
    /// What a module imports, by the name that it has there.
    imports: BTreeMap<(Module, String), Module>,
    /// Structs and enums, each in its module.
    types: BTreeSet<(Module, String)>,
    /// Types that have methods of their own in a module, as they are named there.
    impls: Vec<(Module, Module)>,
    /// Functions and their lines.
    functions: Vec<Measured>,
    /// Structs and their fields.
    structs: Vec<Measured>,
    /// Traits and their methods.
    traits: Vec<Measured>,
}

fn is_test(attributes: &[syn::Attribute]) -> bool {
    attributes.iter().any(|a| match &a.meta {
        syn::Meta::Path(path) => path.is_ident("test"),
        syn::Meta::List(list) => {
            list.path.is_ident("cfg") && ["test", "any (test , fuzzing)"].contains(&&*list.tokens.to_string())
        }
        syn::Meta::NameValue(_) => false,
    })
}

impl Crate {
    /// The crate of a root file.
    fn of(root: &Path) -> Crate {
        let mut krate = Crate::default();
        krate.read(root, Vec::new());
        krate
    }

    /// Parses a file and those of its modules.
    fn read(&mut self, file: &Path, module: Module) {
        let text = std::fs::read_to_string(file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        let parsed = syn::parse_file(&text).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        self.items(file, &module, &parsed.items);
    }

    fn items(&mut self, file: &Path, module: &Module, items: &[syn::Item]) {
        self.modules.insert(module.clone(), file.to_owned());
        for item in items {
            match item {
                syn::Item::Mod(inner) if is_test(&inner.attrs) => {}
                syn::Item::Mod(inner) => {
                    let mut name = module.clone();
                    name.push(inner.ident.to_string());
                    match &inner.content {
                        Some((_, items)) => self.items(file, &name, items),
                        None => self.read(&file_of(file, module, &inner.ident.to_string()), name),
                    }
                }
                syn::Item::Use(import) if !is_test(&import.attrs) => {
                    let public = !matches!(import.vis, syn::Visibility::Inherited);
                    self.import(module, &import.tree, &mut Vec::new(), public);
                }
                item => Walk { krate: self, file, module }.visit_item(item),
            }
        }
    }

    fn import(&mut self, module: &Module, tree: &syn::UseTree, path: &mut Module, public: bool) {
        let mut named = |path: &Module, name: &syn::Ident, known_as: &syn::Ident| {
            let mut full = path.clone();
            if name != "self" {
                full.push(name.to_string());
            }
            self.imports.insert((module.clone(), known_as.to_string()), full.clone());
            if public {
                // A name that is not a module of this crate belongs to another one.
                let target = absolute(module, &full).unwrap_or_else(|| [module.as_slice(), &full].concat());
                self.exports.insert((module.clone(), known_as.to_string()), target);
            } else {
                self.named.push((module.clone(), full));
            }
        };
        match tree {
            syn::UseTree::Path(part) => {
                path.push(part.ident.to_string());
                self.import(module, &part.tree, path, public);
                path.pop();
            }
            syn::UseTree::Name(name) => named(path, &name.ident, &name.ident),
            syn::UseTree::Rename(renamed) => named(path, &renamed.ident, &renamed.rename),
            syn::UseTree::Glob(_) => self.named.push((module.clone(), path.clone())),
            syn::UseTree::Group(group) => group.items.iter().for_each(|tree| self.import(module, tree, path, public)),
        }
    }

    /// The module that a path leads to, through what modules export.
    fn resolve(&self, module: &Module, path: &Module) -> Option<&Module> {
        // A path may begin with a module of this one.
        let local: Module = [module.as_slice(), path].concat();
        let known = |path: &Module| path.len() > module.len() && self.modules.contains_key(&path[..=module.len()]);
        let mut target = absolute(module, path).or_else(|| known(&local).then_some(local))?;
        for _ in 0..16 {
            let (at, _) = (0..=target.len()).rev().find_map(|n| self.modules.get_key_value(&target[..n]))?;
            match target.get(at.len()).and_then(|next| self.exports.get(&(at.clone(), next.clone()))) {
                Some(export) => target = [export.as_slice(), &target[at.len() + 1..]].concat(),
                None => return Some(at),
            }
        }
        None
    }

    /// Which files each file needs.
    fn needs(&self) -> BTreeMap<&Path, BTreeSet<&Path>> {
        let mut needs: BTreeMap<&Path, BTreeSet<&Path>> = BTreeMap::new();
        for (module, path) in &self.named {
            if let Some(target) = self.resolve(module, path) {
                let (from, to) = (&*self.modules[module], &*self.modules[target]);
                if from != to {
                    needs.entry(from).or_default().insert(to);
                }
            }
        }
        // Methods in another file than the type's know its fields, and the type's own file calls them.
        for (module, path) in &self.impls {
            if let Some(home) = self.file_of_type(module, path).filter(|home| *home != self.modules[module]) {
                let file = &*self.modules[module];
                needs.entry(file).or_default().insert(home);
                needs.entry(home).or_default().insert(file);
            }
        }
        needs
    }

    /// The file of a type that is named in a module.
    fn file_of_type(&self, module: &Module, path: &Module) -> Option<&Path> {
        if path.len() == 1 && self.types.contains(&(module.clone(), path[0].clone())) {
            return Some(&self.modules[module]);
        }
        let full = match self.imports.get(&(module.clone(), path[0].clone())) {
            Some(import) => [import.as_slice(), &path[1..]].concat(),
            None => path.clone(),
        };
        self.resolve(module, &full).map(|home| &*self.modules[home])
    }

    /// A circle of files for each file that lies on one.
    fn circles(&self) -> BTreeSet<String> {
        let needs = self.needs();
        let circle = |start: &Path| -> Option<Vec<String>> {
            let mut from: BTreeMap<&Path, &Path> = BTreeMap::new();
            let mut open = vec![start];
            while let Some(file) = open.pop() {
                for &next in needs.get(file).into_iter().flatten() {
                    if next == start {
                        let back = std::iter::successors(Some(file), |file| from.get(file).copied());
                        return Some(back.map(|file| file.display().to_string()).collect());
                    }
                    if let std::collections::btree_map::Entry::Vacant(fresh) = from.entry(next) {
                        fresh.insert(file);
                        open.push(next);
                    }
                }
            }
            None
        };
        let mut found = BTreeSet::new();
        for file in needs.keys() {
            if let Some(mut files) = circle(file) {
                files.sort();
                found.insert(files.join(" <-> "));
            }
        }
        found
    }
}

/// A path as from the root of the crate, where it says so.
fn absolute(module: &Module, path: &Module) -> Option<Module> {
    let mut at = match path.first()?.as_str() {
        "crate" => Vec::new(),
        "self" | "super" => module.clone(),
        _ => return None,
    };
    let mut rest = path.as_slice();
    while let Some(first) = rest.first().filter(|part| matches!(part.as_str(), "crate" | "self" | "super")) {
        if first == "super" {
            at.pop();
        }
        rest = &rest[1..];
    }
    at.extend_from_slice(rest);
    Some(at)
}

fn file_of(parent: &Path, module: &Module, name: &str) -> PathBuf {
    let folder = parent.parent().unwrap();
    let own = matches!(parent.file_name().and_then(|n| n.to_str()), Some("lib.rs" | "main.rs" | "mod.rs"));
    // The root of a program may have another name.
    let folder = if own || module.is_empty() { folder.to_owned() } else { folder.join(parent.file_stem().unwrap()) };
    let flat = folder.join(format!("{name}.rs"));
    if flat.exists() {
        flat
    } else {
        folder.join(name).join("mod.rs")
    }
}

/// Collects what an item names and how long its functions are.
struct Walk<'a> {
    krate: &'a mut Crate,
    file: &'a Path,
    module: &'a Module,
}

impl Walk<'_> {
    fn function(&mut self, name: &syn::Ident, signature: &syn::Signature, block: &syn::Block) {
        let lines = block.span().end().line - signature.span().start().line + 1;
        self.krate.functions.push((self.file.to_owned(), name.to_string(), lines));
    }
}

impl<'ast> Visit<'ast> for Walk<'_> {
    fn visit_item(&mut self, item: &'ast syn::Item) {
        let attributes: &[syn::Attribute] = match item {
            syn::Item::Fn(item) => &item.attrs,
            syn::Item::Impl(item) => &item.attrs,
            syn::Item::Struct(item) => &item.attrs,
            syn::Item::Const(item) => &item.attrs,
            _ => &[],
        };
        if !is_test(attributes) {
            visit::visit_item(self, item);
        }
    }

    fn visit_item_use(&mut self, import: &'ast syn::ItemUse) {
        self.krate.import(self.module, &import.tree, &mut Vec::new(), false);
    }

    fn visit_item_struct(&mut self, item: &'ast syn::ItemStruct) {
        self.krate.types.insert((self.module.clone(), item.ident.to_string()));
        self.krate.structs.push((self.file.to_owned(), item.ident.to_string(), item.fields.len()));
        visit::visit_item_struct(self, item);
    }

    fn visit_item_enum(&mut self, item: &'ast syn::ItemEnum) {
        self.krate.types.insert((self.module.clone(), item.ident.to_string()));
        visit::visit_item_enum(self, item);
    }

    fn visit_item_trait(&mut self, item: &'ast syn::ItemTrait) {
        let methods = item.items.iter().filter(|item| matches!(item, syn::TraitItem::Fn(_))).count();
        self.krate.traits.push((self.file.to_owned(), item.ident.to_string(), methods));
        visit::visit_item_trait(self, item);
    }

    fn visit_item_impl(&mut self, item: &'ast syn::ItemImpl) {
        if let (None, syn::Type::Path(own)) = (&item.trait_, &*item.self_ty) {
            let path: Module = own.path.segments.iter().map(|part| part.ident.to_string()).collect();
            self.krate.impls.push((self.module.clone(), path));
        }
        visit::visit_item_impl(self, item);
    }

    fn visit_item_fn(&mut self, function: &'ast syn::ItemFn) {
        self.function(&function.sig.ident, &function.sig, &function.block);
        visit::visit_item_fn(self, function);
    }

    fn visit_impl_item_fn(&mut self, function: &'ast syn::ImplItemFn) {
        if !is_test(&function.attrs) {
            self.function(&function.sig.ident, &function.sig, &function.block);
            visit::visit_impl_item_fn(self, function);
        }
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        if path.leading_colon.is_none() && path.segments.len() > 1 {
            let parts = path.segments.iter().map(|part| part.ident.to_string()).collect();
            self.krate.named.push((self.module.clone(), parts));
        }
        visit::visit_path(self, path);
    }
}

/// The root files of a package's library, programs, benchmarks and fuzz targets: where cargo looks for them, and where Cargo.toml names them.
fn roots(package: &Path, manifest: &str) -> BTreeSet<PathBuf> {
    let mut roots: BTreeSet<PathBuf> = ["src/lib.rs", "src/main.rs"].map(|file| package.join(file)).into();
    for folder in ["src/bin", "benches"] {
        for entry in std::fs::read_dir(package.join(folder)).into_iter().flatten().flatten() {
            let path = entry.path();
            roots.extend([path.join("main.rs"), path].into_iter().filter(|file| file.extension().is_some_and(|e| e == "rs")));
        }
    }
    let named = manifest.lines().filter_map(|line| line.strip_prefix("path = \"")?.strip_suffix('"'));
    roots.extend(named.filter(|file| file.ends_with(".rs") && !file.starts_with("tests/")).map(|file| package.join(file)));
    roots.retain(|file| file.is_file());
    roots
}

/// Every crate of the repository.
fn crates() -> Vec<(String, Crate)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folders = std::fs::read_dir(root).unwrap().map(|entry| entry.unwrap().path());
    let inner = ["soft-plugin/so", "benches/pure"].map(|folder| root.join(folder));
    let mut found = Vec::new();
    for folder in folders.chain(inner).chain([root.to_owned()]) {
        let Ok(manifest) = std::fs::read_to_string(folder.join("Cargo.toml")) else { continue };
        found.extend(roots(&folder, &manifest).iter().map(|file| (file.display().to_string(), Crate::of(file))));
    }
    found
}

#[test]
fn no_files_import_each_other() {
    let all = crates();
    let part = |name: &str| all.iter().any(|(file, _)| file.ends_with(name));
    let parts =
        ["src/lib.rs", "tools/src/perf.rs", "src/bin/uccl-devmem-agent.rs", "cost/main.rs", "pure.rs", "fuzz_targets/frames.rs"];
    assert_eq!(parts.map(part), [true; 6], "crates of the repository were not found");
    let needs: usize = all.iter().flat_map(|(_, krate)| krate.needs().into_values()).map(|files| files.len()).sum();
    assert!(needs > 300, "only {needs} imports were understood");
    let circles: Vec<String> = all.iter().flat_map(|(_, krate)| krate.circles()).collect();
    assert!(circles.is_empty(), "{} circles:\n{}", circles.len(), circles.join("\n"));
}

#[test]
fn no_function_is_long() {
    let all = crates();
    let functions = || all.iter().flat_map(|(_, krate)| &krate.functions);
    assert!(functions().count() > 1000, "the functions of the workspace were not found");
    let long: Vec<String> = functions()
        .filter(|(_, _, lines)| *lines > LINES)
        .map(|(file, name, lines)| format!("{}: {name} has {lines} lines", file.display()))
        .collect();
    assert!(long.is_empty(), "{} functions:\n{}", long.len(), long.join("\n"));
}

/// What may be larger than its limit, and why. Its methods lie in its own file all the same.
const EXCEPTIONS: [(&str, &str); 12] = [
    ("ucclNetExt_v2", "a C structure: the table of the plugin's extension"),
    ("uccl_totals_t", "a C structure"),
    ("uccl_channel_stats_t", "a C structure"),
    ("ChannelStats", "counters, one for each of uccl_channel_stats_t"),
    ("EngineStats", "counters, one for each of uccl_stats_t"),
    ("Config", "one field a setting"),
    ("Traits", "one field a question about a plugin, answered once"),
    ("NetTable", "one method a function of the plugin interface"),
    ("Row", "one field a column of the benchmark's table"),
    ("Counters", "what a test program counts"),
    ("Measuring", "one field an option of the command line"),
    ("LocalMemory", "one method a thing that a kind of memory does, areas for staging among them"),
];

fn is_excepted(name: &str) -> bool {
    EXCEPTIONS.iter().any(|(excepted, _)| *excepted == name)
}

/// Those over a limit.
fn over(sizes: impl Fn(&Crate) -> &[Measured], limit: usize) -> Vec<Measured> {
    crates().iter().flat_map(|(_, krate)| sizes(krate)).filter(|(_, _, size)| *size > limit).cloned().collect()
}

/// Those over a limit, less the exceptions, as lines.
fn faults(sizes: impl Fn(&Crate) -> &[Measured], limit: usize, what: &str) -> String {
    let faults = over(sizes, limit).into_iter().filter(|(_, name, _)| !is_excepted(name));
    faults.map(|(file, name, size)| format!("{}: {name} has {size} {what}\n", file.display())).collect()
}

#[test]
fn no_struct_has_many_fields() {
    let faults = faults(|krate| &krate.structs, FIELDS, "fields");
    assert!(faults.is_empty(), "\n{faults}");
}

#[test]
fn no_trait_has_many_methods() {
    let faults = faults(|krate| &krate.traits, METHODS, "methods");
    assert!(faults.is_empty(), "\n{faults}");
}

/// An exception that has become unnecessary leaves the list.
#[test]
fn every_exception_is_one() {
    let large = [over(|krate| &krate.structs, FIELDS), over(|krate| &krate.traits, METHODS)].concat();
    let stale: Vec<_> = EXCEPTIONS.iter().filter(|(name, _)| large.iter().all(|(_, large, _)| large != name)).collect();
    assert!(stale.is_empty(), "{stale:?}");
}

#[test]
fn methods_in_another_file_are_a_circle_and_sizes_are_counted() {
    let scratch = Scratch::new("methods");
    scratch.write("lib.rs", "mod a; mod b;");
    scratch.write(
        "a.rs",
        "mod child;\npub struct Large { pub x: u8, y: u8 }\npub trait Wide { fn one(); fn two() {} const C: u8; }",
    );
    scratch.write(
        "a/child.rs",
        "use super::Large;\nimpl Large { fn more(&self) {} }\n#[cfg(test)]\nstruct Test { a: u8, b: u8, c: u8 }",
    );
    // A trait for a type of another file is no part of the type.
    scratch.write("b.rs", "use crate::a;\npub trait Named { fn name(&self); }\nimpl Named for a::Large { fn name(&self) {} }");
    let krate = scratch.read();
    let circles: Vec<String> = krate.circles().into_iter().collect();
    assert_eq!(circles, [[scratch.name("a.rs"), scratch.name("a/child.rs")].join(" <-> ")]);
    assert_eq!(krate.structs, [(scratch.0.join("a.rs"), "Large".to_owned(), 2)]);
    let traits: Vec<_> = krate.traits.iter().map(|(_, name, methods)| (name.as_str(), *methods)).collect();
    assert_eq!(traits, [("Wide", 2), ("Named", 1)]);
}

#[test]
fn a_circle_is_found_through_what_a_module_exports() {
    let scratch = Scratch::new("exports");
    scratch.write("lib.rs", "mod a; mod b; mod c;");
    scratch.write("a.rs", "mod one;\npub use one::One;\nuse std::fmt::Debug;");
    scratch.write("a/one.rs", "use crate::b;\npub struct One(b::Two);");
    scratch.write("b.rs", "pub struct Two;\nfn f() {\n    crate::c::make();\n}");
    scratch
        .write("c.rs", "use crate::a::One;\n#[cfg(test)]\nmod tests {\n    use crate::b;\n}\npub fn make() -> One { todo!() }");
    let krate = scratch.read();
    let files = ["a/one.rs", "b.rs", "c.rs"].map(|file| scratch.name(file));
    assert_eq!(krate.circles().into_iter().collect::<Vec<_>>(), [files.join(" <-> ")]);
    assert!(krate.functions.contains(&(scratch.0.join("b.rs"), "f".to_owned(), 3)));
}

/// A crate in a folder of its own.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Scratch {
        Scratch(std::env::temp_dir().join(format!("layering-{name}-{}", std::process::id())))
    }

    fn write(&self, name: &str, text: &str) {
        let file = self.0.join(name);
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        std::fs::write(file, text).unwrap();
    }

    fn read(&self) -> Crate {
        Crate::of(&self.0.join("lib.rs"))
    }

    fn name(&self, file: &str) -> String {
        self.0.join(file).display().to_string()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
